"""Makes the golden files of this folder, except those of the other scripts.

Run: python generate.py (README.md says which file comes from which script).
"""

import json
import shutil
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from common import HERE, MODELS, WITH_IMAGES, build, load, randomise, rows, strip, trainer

NAMES = ["llama", "mistral", "qwen2", "qwen3"]
# Each model with its seed.
FAMILIES = {
    "gemma3": 400,
    "gemma2": 401,
    "gemma2-64": 402,
    "phi3": 403,
    "phi3-long": 404,
    "glm4": 405,
    "glm4-64": 406,
    "smollm3": 420,
    "smollm3-64": 421,
    "granite": 422,
    "granite-64": 423,
    "olmo2": 424,
    "olmo2-64": 425,
    "olmo3": 426,
    "olmo3-64": 427,
    "ministral": 428,
    "ministral-64": 429,
    "ministral3": 430,
    "ministral3-64": 431,
    "qwen2_vl": 440,
    "qwen2_5_vl": 441,
    "qwen3_vl": 442,
    "qwen3_vl-64": 443,
    "gemma3-images": 444,
    "mistral3-images": 445,
}
# Rows of other models than those of pairs.jsonl. With longrope, transformers takes the frequencies of a batch from its longest
# sequence, and Bradley those of a sequence from its own length. Here all sequences of a batch are on one side of the pretrained context.
OTHER_ROWS = {"phi3-long": "longrope_pairs.jsonl"}
# Models whose full run has weights in f64. In f32, rounding adds up over ten steps: TRL's own gradient norm of ministral3 is off by
# 1.5e-4 at one step. Other models cannot run so: the lowest f64 number of a mask is -inf in transformers' softmax, which is in f32.
IN_F64 = ["ministral3"]
CHAT, PLAIN = rows("pairs.jsonl"), rows("plain.jsonl")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(name, value):
    (HERE / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def token_logps(model, prompt, completion):
    """log p of each completion token, its distribution's mean logit, entropy and log Σp², and whether it is the most likely."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    logits, target = logits[at], torch.tensor(completion)
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(1, target[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return dict(
        logps=picked.tolist(),
        mean_logits=logits.mean(-1).tolist(),
        entropy=entropy.tolist(),
        log_sum_p2=(2 * logp).exp().sum(-1).log().tolist(),
        argmax=(logits.argmax(-1) == target).tolist(),
    )


def models():
    shutil.rmtree(MODELS, ignore_errors=True)
    for i, name in enumerate(NAMES):
        build(name, 100 + i, MODELS / name)
        build(name, 200 + i, MODELS / f"{name}-ref")
    model, tok = load("llama")
    model.save_pretrained(MODELS / "llama-sharded", max_shard_size="40KB")
    tok.save_pretrained(MODELS / "llama-sharded")
    model.to(torch.bfloat16).save_pretrained(MODELS / "llama-bf16")
    tok.save_pretrained(MODELS / "llama-bf16")


def tokens_and_logps():
    tokens, logps = {}, {}
    for name in NAMES:
        model, tok = load(name)
        ref, _ = load(f"{name}-ref")
        tokens[name], logps[name] = {}, {}
        for kind, data in (("chat", CHAT), ("plain", PLAIN)):
            prepared = trainer(model, tok, data, ref=ref).train_dataset
            for row, p in zip(data, prepared, strict=True):
                entry = dict(prompt=p["prompt_ids"], chosen=p["chosen_ids"], rejected=p["rejected_ids"])
                if kind == "chat":
                    entry["text"] = tok.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
                    entry["whole"] = tok.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
                tokens[name][row["id"]] = entry
                logps[name][row["id"]] = {
                    side: dict(
                        policy=token_logps(model, entry["prompt"], entry[side]),
                        reference=token_logps(ref, entry["prompt"], entry[side])["logps"],
                    )
                    for side in ("chosen", "rejected")
                }
    write("tokens.json", tokens)
    write("logps.json", logps)


LOSSES = [
    dict(loss_type=[name], **extra)
    for name, extra in [
        ("sigmoid", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("exo_pair", dict(label_smoothing=0.05)),
        ("nca_pair", {}),
        ("robust", dict(label_smoothing=0.1)),
        ("bco_pair", {}),
        ("sppo_hard", {}),
        ("aot", dict(label_smoothing=0.1)),
        ("aot_unpaired", dict(label_smoothing=0.1)),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {}),
        ("sft", {}),
        ("sigmoid_norm", {}),
        ("sigmoid", dict(beta=0.5)),
        ("sigmoid", dict(f_divergence_type="forward_kl")),
        ("sigmoid", dict(f_divergence_type="js_divergence")),
        ("sigmoid", dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5)),
        ("ipo", dict(f_divergence_type="js_divergence")),
        ("sigmoid", dict(use_weighting=True)),
        # hinge with weighting cannot be had: TRL multiplies the relu in place and torch refuses to differentiate it.
        ("nca_pair", dict(use_weighting=True)),
        ("sigmoid", dict(ld_alpha=0.3)),
    ]
] + [
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    # TRL smooths exo_pair, and sigmoid not at all.
    dict(loss_type=["exo_pair", "sigmoid"], loss_weights=[1.0, 0.5], label_smoothing=0.05),
]


def losses():
    """Each loss from TRL's own code on four pairs: value, gradient norm and metrics."""
    model, tok = load("llama")
    ref, _ = load("llama-ref")
    data = CHAT[:4]
    out = []
    for settings in LOSSES:
        t = trainer(model, tok, data, ref=ref, per_device_train_batch_size=4, **settings)
        batch = next(iter(t.get_train_dataloader()))
        t.model.train()
        t.model.zero_grad()
        loss = t.compute_loss(t.model, batch)
        loss.backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in t.model.parameters()))
        metrics = {k: v[-1] for k, v in t._metrics["train"].items()}
        out.append(dict(settings=settings, beta=settings.get("beta", 0.1), loss=loss.item(), grad_norm=norm.item(), metrics=metrics))
    write("losses.json", dict(model="llama", reference="llama-ref", pairs=[r["id"] for r in data], cases=out))


def grads():
    """∂loss/∂w of the mean sigmoid loss over two pairs for every weight, and for every adapter tensor."""
    for i, name in enumerate(NAMES):
        model, tok = load(name)
        ref, _ = load(f"{name}-ref")
        t = trainer(model, tok, CHAT[:2], ref=ref)
        batch = next(iter(t.get_train_dataloader()))
        t.model.train()
        t.compute_loss(t.model, batch).backward()
        save_file({n: p.grad.contiguous() for n, p in t.model.named_parameters()}, HERE / f"grads_{name}.safetensors")

        base, tok = load(name)
        adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(300 + i)
        with torch.no_grad():
            for n, p in adapted.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        adapted.save_pretrained(HERE / "adapters" / name)
        base, tok = load(name)
        adapted = PeftModel.from_pretrained(base, HERE / "adapters" / name, is_trainable=True)
        # The reference is the base with the adapter off: TRL does so for a model that it wraps itself.
        logps = {}
        for row, p in zip(CHAT, trainer(load(name)[0], tok, CHAT, ref=ref).train_dataset, strict=True):
            logps[row["id"]] = {s: token_logps(adapted, p["prompt_ids"], p[f"{s}_ids"])["logps"] for s in ("chosen", "rejected")}
        write(f"adapters/{name}/logps.json", logps)
        loss = torch.zeros(())
        pairs = [p for _, p in zip(range(2), trainer(load(name)[0], tok, CHAT[:2], ref=ref).train_dataset)]
        for p in pairs:
            deltas = []
            for s in ("chosen", "rejected"):
                ids = torch.tensor([p["prompt_ids"] + p[f"{s}_ids"]])
                n = len(p["prompt_ids"])
                def total():
                    logp = torch.log_softmax(adapted(ids).logits[0].float(), -1)[n - 1 : -1]
                    return logp.gather(1, ids[0, n:, None]).sum()
                with torch.no_grad(), adapted.disable_adapter():
                    reference = total()
                deltas.append(total() - reference)
            loss = loss - torch.nn.functional.logsigmoid(0.1 * (deltas[0] - deltas[1])) / 2
        loss.backward()
        found = {n.replace(".default", ""): p.grad.contiguous() for n, p in adapted.named_parameters() if p.grad is not None}
        save_file(found, HERE / "adapters" / name / "grads.safetensors")
        (HERE / "adapters" / name / "README.md").unlink(missing_ok=True)


RUNS = {
    "full": dict(max_steps=10, learning_rate=1e-3),
    "full_accumulate_cosine": dict(
        max_steps=6, learning_rate=1e-3, gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1
    ),
    "lora": dict(max_steps=10, learning_rate=1e-2),
}
KEYS = [
    "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens", "epoch",
]


def train(t):
    """Runs the training and returns what TRL logs at each step."""
    t.train()
    return [{k: h[k] for k in KEYS if k in h} for h in t.state.log_history if "loss" in h]


def trajectories():
    out = {}
    for name in ("llama", "qwen2"):
        for run, settings in RUNS.items():
            model, tok = load(name)
            if run == "lora":
                start = HERE / "adapters" / f"{name}-start"
                config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
                torch.manual_seed(7)
                t = trainer(model, tok, CHAT, peft_config=config, **settings)
                t.model.save_pretrained(start)
                (start / "README.md").unlink(missing_ok=True)
            else:
                t = trainer(model, tok, CHAT, ref=load(name)[0], **settings)
            steps = train(t)
            out[f"{name}/{run}"] = dict(model=name, settings=settings, steps=steps)
    write("trajectories.json", out)


def family_trajectories():
    """TRL's runs of ten steps of the models of each further family: full, and LoRA on all linear layers.

    TRL trains the text of a model of text and images as it is, if the trainer gets a tokenizer instead of a processor. Its vision tower
    then has no gradients. With names of models among the arguments, beside the name of this part: only those.
    """
    for name in FAMILIES:
        if any(other in sys.argv[1:] for other in FAMILIES) and name not in sys.argv[1:]:
            continue
        file = OTHER_ROWS.get(name, "pairs.jsonl")
        # all-linear would include the layers of the vision tower.
        targets = r"model\.language_model\.layers\..*_proj" if name in WITH_IMAGES else "all-linear"
        runs = {}
        for run in ("full", "lora"):
            model, tok = load(name)
            if run == "lora":
                config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
                torch.manual_seed(7)
                t = trainer(model, tok, rows(file), peft_config=config, **RUNS[run])
                save_start(t.model, name)
            else:
                dtype = torch.float64 if name in IN_F64 else torch.float32
                t = trainer(model.to(dtype), tok, rows(file), ref=load(name)[0].to(dtype), **RUNS[run])
            runs[run] = dict(settings=RUNS[run], steps=train(t))
        write(f"trajectories_{name}.json", dict(rows=file, runs=runs))


def save_start(adapted, name):
    """Writes an untrained adapter, without the path of its base model on this machine."""
    folder = HERE / "adapters" / f"{name}-start"
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = name
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def rewards():
    """Writes the rewards that TRL's trainers log for losses of mean log-probs that need no reference, and an SFT run with a reference."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tok = load("llama")
    data = CHAT[:4]
    prepared = trainer(load("llama")[0], tok, data, ref=load("llama-ref")[0]).train_dataset
    batch = {}
    for side in ("chosen", "rejected"):
        # The tokens are DPOTrainer's, so that only the rewards that are computed from their log-probs are compared.
        ids = [p["prompt_ids"] + p[f"{side}_ids"] for p in prepared]
        labels = [[-100] * len(p["prompt_ids"]) + p[f"{side}_ids"] for p in prepared]
        longest = max(map(len, ids))
        pad = lambda rows, value: torch.tensor([row + [value] * (longest - len(row)) for row in rows])
        batch[f"{side}_input_ids"], batch[f"{side}_labels"] = pad(ids, tok.pad_token_id), pad(labels, -100)
        batch[f"{side}_attention_mask"] = pad([[1] * len(row) for row in ids], 0)
    logged = {}
    for name, make, config, settings in (
        ("simpo", CPOTrainer, CPOConfig, dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0)),
        ("orpo", ORPOTrainer, ORPOConfig, dict(beta=0.2)),
    ):
        args = config(output_dir="/tmp/bradley-goldens", use_cpu=True, bf16=False, report_to="none", max_length=256, disable_tqdm=True, **settings)
        t = make(model=model, args=args, train_dataset=Dataset.from_list([strip(r) for r in data]), processing_class=tok)
        with torch.no_grad():
            loss, metrics = t.get_batch_loss_metrics(model, batch)
        metrics = {k: float(v) for k, v in metrics.items() if k.startswith("rewards/")}
        # ORPOTrainer's loss includes the prompt's NLL, which Bradley's does not.
        logged[name] = dict(settings=settings, loss=loss.item() if name == "simpo" else None, metrics=metrics)

    model, tok = load("llama")
    settings = dict(loss_type=["sft"], max_steps=4, learning_rate=1e-3)
    t = trainer(model, tok, CHAT, ref=load("llama")[0], **settings)
    steps = train(t)
    write("rewards.json", dict(pairs=[r["id"] for r in data], logged=logged, sft=dict(settings=settings, steps=steps)))


# A policy and a reference that is another model with the same tokenizer: of the same shape, and of another family.
REFERENCES = [("llama", "llama-ref"), ("qwen2", "qwen3")]
REFERENCE_RUNS = {"full": dict(max_steps=4, learning_rate=1e-3), "lora": dict(max_steps=4, learning_rate=1e-2)}


def references():
    """Log-probs under a policy and another model as its reference, and TRL's steps with that `ref_model`."""
    out = []
    for name, other in REFERENCES:
        model, tok = load(name)
        ref, ref_tok = load(other)
        assert tok.get_vocab() == ref_tok.get_vocab()
        scores = {}
        for row, p in zip(CHAT, trainer(model, tok, CHAT, ref=ref).train_dataset, strict=True):
            of = lambda m, side: token_logps(m, p["prompt_ids"], p[f"{side}_ids"])["logps"]
            scores[row["id"]] = {s: dict(policy=of(model, s), reference=of(ref, s)) for s in ("chosen", "rejected")}
        runs = {}
        for run, settings in REFERENCE_RUNS.items():
            policy, ref = load(name)[0], load(other)[0]
            if run == "lora":
                policy = PeftModel.from_pretrained(policy, HERE / "adapters" / f"{name}-start", is_trainable=True)
            t = trainer(policy, tok, CHAT, ref=ref, **settings)
            steps = train(t)
            runs[run] = dict(settings=settings, steps=steps)
        out.append(dict(policy=name, reference=other, scores=scores, runs=runs))
    write("references.json", out)


ROPES = [
    dict(rope_type="default"),
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    dict(rope_type="dynamic", factor=2.5),
    dict(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=128, short_factor=[1 + 0.1 * i for i in range(16)],
        long_factor=[1.5 + 0.5 * i for i in range(16)],
    ),
]


def formulas():
    """Losses and settings that TRL's DPOTrainer does not have, from their formulas in float64, with
    torch's gradients for every token."""
    from torch.nn.functional import logsigmoid

    generator = torch.Generator().manual_seed(11)
    draw = lambda n: (-3 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.05).float().double()
    lengths = [(4, 7), (6, 2), (3, 3)]
    beta, eps, gamma, lam, dpop, alpha = 0.3, 0.1, 0.5, 0.2, 2.0, 0.4

    def each(loss):
        return lambda pairs: torch.stack([loss(*p) for p in pairs]).mean()

    def nll(pairs):
        return -torch.cat([w for w, _, _, _ in pairs]).mean()

    def odds(logps):
        a = logps.mean()
        return a - torch.log1p(-a.exp())

    cases = {
        # arXiv:2305.18290 with conservative labels
        "cdpo": each(lambda w, l, rw, rl: -(1 - eps) * logsigmoid(beta * ((w - rw).sum() - (l - rl).sum())) - eps * logsigmoid(-beta * ((w - rw).sum() - (l - rl).sum()))),
        # arXiv:2402.13228, equation 3
        "dpop": each(lambda w, l, rw, rl: -logsigmoid(beta * ((w - rw).sum() - (l - rl).sum() - dpop * torch.relu(-(w - rw).sum())))),
        # arXiv:2404.19733: DPO plus alpha times the chosen answer's NLL
        "rpo": lambda pairs: each(lambda w, l, rw, rl: -logsigmoid(beta * ((w - rw).sum() - (l - rl).sum())))(pairs) + alpha * nll(pairs),
        # arXiv:2405.14734, equation 6
        "simpo": each(lambda w, l, rw, rl: -logsigmoid(beta * (w.mean() - l.mean()) - gamma)),
        # arXiv:2403.07691, equations 6 and 7
        "orpo": lambda pairs: nll(pairs) - lam * each(lambda w, l, rw, rl: logsigmoid(odds(w) - odds(l)))(pairs),
        "reference_free": each(lambda w, l, rw, rl: -logsigmoid(beta * (w.sum() - l.sum()))),
    }
    out = []
    for name, loss in cases.items():
        pairs = [(draw(n).requires_grad_(), draw(m).requires_grad_(), draw(n), draw(m)) for n, m in lengths]
        value = loss(pairs)
        value.backward()
        out.append(dict(
            name=name, beta=beta, label_smoothing=eps, simpo_gamma=gamma, orpo_lambda=lam, dpop_lambda=dpop, rpo_alpha=alpha, loss=value.item(),
            pairs=[dict(w=w.tolist(), l=l.tolist(), rw=rw.tolist(), rl=rl.tolist(), gw=w.grad.tolist(), gl=l.grad.tolist()) for w, l, rw, rl in pairs],
        ))
    write("formulas.json", out)


def ropes():
    """Inverse frequencies and attention factors from transformers' own functions, with the config.json that asks for them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    out = []
    for parameters in ROPES:
        config = LlamaConfig(
            vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512,
            rope_parameters=dict(rope_theta=20000.0, **parameters),
        )
        rotary = LlamaRotaryEmbedding(config)
        case = dict(config=config.to_dict(), inv_freq=rotary.inv_freq.tolist(), attention_factor=float(rotary.attention_scaling))
        if parameters["rope_type"] in ("dynamic", "longrope"):
            # The frequencies of a sequence that is longer than the context.
            case["long"] = dict(length=700, inv_freq=ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=700)[0].tolist())
        out.append(case)
    (HERE / "ropes.json").write_text(json.dumps(out, indent=1, default=str) + "\n")


def families():
    """Makes the models of further families, their log-probs, and the gradients of Σ log p of the chosen answers minus Σ log p of the
    rejected ones of two pairs.

    With names of models among the arguments, beside the name of this part: only those.
    """
    for name, seed in FAMILIES.items():
        if any(other in sys.argv[1:] for other in FAMILIES) and name not in sys.argv[1:]:
            continue
        build(name, seed, MODELS / name)
        model, tok = load(name)
        # As in common.trainer: no gradient is dropped.
        model.get_input_embeddings().padding_idx = None
        # The tokens depend on the tokenizer alone, so a model of text serves for those with images.
        text = "qwen2" if name in WITH_IMAGES else name
        prepared = trainer(load(text)[0], tok, CHAT, ref=load(text)[0]).train_dataset
        logps = {}
        for row, p in zip(CHAT, prepared, strict=True):
            logps[row["id"]] = {s: token_logps(model, p["prompt_ids"], p[f"{s}_ids"])["logps"] for s in ("chosen", "rejected")}
        write(f"logps_{name}.json", logps)
        total = torch.zeros(())
        for p in list(prepared)[:2]:
            for side, sign in (("chosen", 1), ("rejected", -1)):
                ids = torch.tensor([p["prompt_ids"] + p[f"{side}_ids"]])
                n = len(p["prompt_ids"])
                logp = torch.log_softmax(model(ids).logits[0].float(), -1)[n - 1 : -1]
                total = total + sign * logp.gather(1, ids[0, n:, None]).sum()
        total.backward()
        # The vision tower has no gradients. The text has the names that it would have alone.
        named = {n.replace("language_model.", ""): p.grad for n, p in model.named_parameters()}
        save_file({n: g.contiguous() for n, g in named.items() if g is not None}, HERE / f"grads_{name}.safetensors")


PARTS = [formulas, ropes, models, families, tokens_and_logps, losses, grads, trajectories, family_trajectories, rewards, references]

if __name__ == "__main__":
    # With names of parts: only these, from the models that are there, except that `models` and `families` make theirs. `models` first
    # deletes all models, also those of `families`.
    for part in PARTS:
        if not sys.argv[1:] or part.__name__ in sys.argv[1:]:
            part()
