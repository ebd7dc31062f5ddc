"""TRL or transformers, as one side of ../compare.py.

Reads one line per round from stdin, runs the round and prints its figures as JSON.

Usage: python trl_side.py MODEL.gguf PAIRS.jsonl MODE f32|bf16 BATCH [MAX_LENGTH]
MODE is train-lora, train-full or score. A line is `FROM TO`, a range of the file's pairs without
those whose prompt has MAX_LENGTH tokens or more.
Versions: tests/goldens/requirements.txt.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_file, pairs_file, mode, precision, batch, *rest = sys.argv[1:]
batch, max_length = int(batch), int(rest[0]) if rest else 512
dtype = torch.float32 if mode.startswith("train") or precision == "f32" else torch.bfloat16
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries talk on stdout


def load():
    file = Path(model_file)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # The weights are plain by now, but transformers still calls the model quantised, and its
    # trainer would refuse it.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


tokenizer = AutoTokenizer.from_pretrained(Path(model_file).parent, gguf_file=Path(model_file).name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def ids(messages, generate):
    return tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate),
        add_special_tokens=False,
    )["input_ids"]


rows = []
for line in Path(pairs_file).read_text().splitlines():
    row = {k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")}
    if len(ids(row["prompt"], True)) < max_length:  # the others are refused by both sides
        rows.append(row)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def train(chosen):
    """Returns the seconds of the whole run and of its first step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            max_length=max_length,
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            logging_steps=1000,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_drop_last=False,
            train_sampling_strategy="sequential",  # the same pairs in a step on both sides
        )
        config = lora() if mode == "train-lora" else None
        trainer = DPOTrainer(
            model=load(),
            ref_model=None if config else load(),
            args=args,
            train_dataset=Dataset.from_list(chosen),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[Clock()],
        )
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, ends[0] - start


def sequences(row):
    prompt = ids(row["prompt"], True)
    for side in ("chosen", "rejected"):
        yield len(prompt), ids(row["prompt"] + row[side], False)[:max_length]


def log_probs(model, chunk):
    """Returns the summed log-probs of the completions of padded sequences, as a simple scoring
    script computes them."""
    longest = max(len(s) for _, s in chunk)
    tokens = torch.full((len(chunk), longest), tokenizer.pad_token_id)
    attention = torch.zeros_like(tokens)
    completion = torch.zeros_like(tokens)
    for i, (prompt, s) in enumerate(chunk):
        tokens[i, : len(s)] = torch.tensor(s)
        attention[i, : len(s)] = 1
        completion[i, prompt : len(s)] = 1
    logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, :-1]
    logp = torch.gather(logits.float().log_softmax(-1), 2, tokens[:, 1:, None])[..., 0]
    return (logp * completion[:, 1:]).sum(1)


@torch.no_grad()
def score(chosen):
    pairs = [list(sequences(row)) for row in chosen]
    start = time.perf_counter()
    for i in range(0, len(pairs), batch):
        chunk = [s for pair in pairs[i : i + batch] for s in pair]
        log_probs(model, chunk)
        with model.disable_adapter():
            log_probs(model, chunk)
    return time.perf_counter() - start, 0.0


model = None
if mode == "score":
    from peft import get_peft_model

    model = get_peft_model(load(), lora()).eval()
print(f"ready {len(rows)}", file=out, flush=True)
for line in sys.stdin:
    first, last = map(int, line.split()[:2])
    chosen = rows[first:last]
    tokens = sum(len(s) for row in chosen for _, s in sequences(row))
    seconds, first_step = score(chosen) if mode == "score" else train(chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "first_step": first_step,
                "pairs": len(chosen),
                "tokens": tokens,
                "peak_bytes": peak,
            }
        ),
        file=out,
        flush=True,
    )
