"""TRL or transformers on a GPU, as one side of ../gpu.py.

Reads one JSON line per round from stdin, runs the round and prints its figures as JSON.

Usage: python trl_gpu.py MODEL_FOLDER PAIRS.jsonl train|score MAX_LENGTH [ADAPTER_FOLDER]
  train: {"batch": 4, "checkpointing": false, "liger": false, "first": 0}
         32 pairs from `first` on, in two steps of 16 pairs, of which the second one is timed
  score: {"batch": 8, "first": 0, "pairs": 32}
         with the policy, which is the model with the adapter, and with the reference
Weights and activations are bf16; LoRA has rank 16 on all linear layers. A round that runs out of
memory answers {"out_of_memory": true}.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

folder, pairs_file, mode, max_length, *adapter = sys.argv[1:]
max_length = int(max_length)
device = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 16
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries talk on stdout

start = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]


def wait():
    if device == "cuda":
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    """Seconds of each step, from device idle to device idle."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        wait()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def train(ask):
    global base
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    chosen = rows[ask["first"] : ask["first"] + 2 * STEP]
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=ask["batch"],
            gradient_accumulation_steps=STEP // ask["batch"],
            max_steps=2,
            max_length=max_length,
            bf16=True,
            gradient_checkpointing=ask["checkpointing"],
            use_liger_kernel=ask["liger"],
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            use_cpu=device == "cpu",
            disable_tqdm=True,
        )
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            model=base,
            args=args,
            train_dataset=Dataset.from_list(chosen),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[clock],
        )
        trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
        try:
            trainer.train()
            losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        finally:
            trainer.model.zero_grad(set_to_none=True)
            base = trainer.accelerator.unwrap_model(trainer.model).unload()
            base.gradient_checkpointing_disable()
    return {
        "seconds": clock.seconds[1],
        "first_seconds": clock.seconds[0],
        "pairs": STEP,
        "losses": losses,
    }


def ids(messages, generate):
    return tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate),
        add_special_tokens=False,
    )["input_ids"]


def log_probs(model, chunk):
    """Returns the summed log-probs of the completions of padded sequences. The head runs on the
    completions only, one sequence at a time."""
    longest = max(len(s) for _, s in chunk)
    tokens = torch.full((len(chunk), longest), tokenizer.pad_token_id)
    attention = torch.zeros_like(tokens)
    for i, (_, s) in enumerate(chunk):
        tokens[i, : len(s)] = torch.tensor(s)
        attention[i, : len(s)] = 1
    hidden = (
        model.get_base_model()
        .model(input_ids=tokens.to(device), attention_mask=attention.to(device), use_cache=False)
        .last_hidden_state
    )
    head, sums = model.get_output_embeddings(), []
    for h, (prompt, s) in zip(hidden, chunk):
        logits = head(h[prompt - 1 : len(s) - 1]).float()
        targets = torch.tensor(s[prompt:], device=device)
        sums.append((logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).sum())
    return torch.stack(sums)


@torch.no_grad()
def score(ask):
    encoded = []
    for row in rows[ask["first"] : ask["first"] + ask["pairs"]]:
        prompt = len(ids(row["prompt"], True))
        encoded.append(
            [
                (prompt, ids(row["prompt"] + row[side], False)[:max_length])
                for side in ("chosen", "rejected")
            ]
        )
    margins, start = [], time.perf_counter()
    for i in range(0, len(encoded), ask["batch"]):
        chunk = [s for pair in encoded[i : i + ask["batch"]] for s in pair]
        policy = log_probs(model, chunk)
        with model.disable_adapter():
            reward = 0.1 * (policy - log_probs(model, chunk))
        margins += (reward[0::2] - reward[1::2]).tolist()  # waits for the device
    return {"seconds": time.perf_counter() - start, "pairs": len(encoded), "margins": margins}


if mode == "score":
    model = PeftModel.from_pretrained(base, adapter[0]).eval()
print(json.dumps({"ready": time.perf_counter() - start}), file=out, flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        answer = train(ask) if mode == "train" else score(ask)
    except torch.cuda.OutOfMemoryError:
        answer = {"out_of_memory": True}
    if device == "cuda":
        answer["peak_bytes"] = torch.cuda.max_memory_reserved()
        gc.collect()
        torch.cuda.empty_cache()  # the other side needs the room
    print(json.dumps(answer), file=out, flush=True)
