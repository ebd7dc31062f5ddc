"""Greedy continuations of the committed tiny models by transformers' generate: writes generation.json.

Run: python generation.py
"""

import json

import torch

from common import HERE, LONGROPE_CONTEXT, MODELS, load

NEW_TOKENS = 32
# Lengths of the prompts: shorter than the windows, at least as long as them, and longer than a block of 64 tokens of Bradley's cache.
LENGTHS = [5, 20, 70]
# The models of generate.py and common.py, without references and other storage of the same model.
NAMES = sorted(p.name for p in MODELS.iterdir() if not p.name.endswith("-ref") and p.name not in ("llama-sharded", "llama-bf16"))


def prompt(name, length):
    """Token ids that look random but need no generator."""
    start = sum(map(ord, name))
    return [(start + 37 * i * i + 11 * i) % 317 + 3 for i in range(length)]


def greedy(model, ids):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens, close = out.sequences[0, len(ids) :].tolist(), []
    for i, logits in enumerate(out.logits):
        first, second = logits[0].float().topk(2).values.tolist()
        if first - second < 1e-5 * max(abs(first), abs(second)):
            close.append(i)
    return dict(prompt=ids, tokens=tokens, ties=close)


golden = {}
for name in NAMES:
    model, _ = load(name)
    model.eval()
    # No token ends the text, so that every continuation has 32 tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # With longrope, transformers changes the frequencies in the middle of a text that passes the pretrained context, but keeps the old keys.
    lengths = [n for n in LENGTHS if name != "phi3-long" or n > LONGROPE_CONTEXT or n + NEW_TOKENS <= LONGROPE_CONTEXT]
    golden[name] = [greedy(model, prompt(name, n)) for n in lengths]
lines = [f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(case) for case in cases) + "\n ]" for name, cases in golden.items()]
(HERE / "generation.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
