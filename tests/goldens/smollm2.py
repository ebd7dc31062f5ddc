"""SmolLM2-135M-Instruct from a GGUF file: tokens, log-probs and a 4-step full fine-tune with TRL.

Usage: python smollm2.py MODEL.gguf [--pairs FILE] [--rows N] [--out FILE]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import HERE, trainer
from generate import KEYS, token_logps

parser = argparse.ArgumentParser()
parser.add_argument("gguf", type=Path)
parser.add_argument("--pairs", type=Path, default=HERE / "smollm2_pairs.jsonl")
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--out", type=Path, default=HERE / "smollm2.json")
args = parser.parse_args()
torch.set_num_threads(2)


def load():
    model = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, attn_implementation="eager", dtype=torch.float32)
    # The weights are plain f32 by now, but transformers still calls the model quantised and its trainer would refuse it.
    model.is_quantized, model.hf_quantizer = False, None
    return model


data = [json.loads(line) for line in args.pairs.read_text().splitlines() if line.strip()]
tok = AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
# TRL drops a row whose prompt alone fills max_length.
fits = [len(tok.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"]) < 256 for r in data]
data = [r for r, ok in zip(data, fits) if ok][: args.rows]
model = load()
t = trainer(model, tok, data, ref=load(), max_steps=4, learning_rate=5e-5, max_length=256)
prepared = list(t.train_dataset)
pairs = []
for row, p in zip(data, prepared, strict=True):
    entry = dict(prompt=p["prompt_ids"], text=tok.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
    for side in ("chosen", "rejected"):
        ids = p[f"{side}_ids"][: 256 - len(p["prompt_ids"])]
        entry[side] = dict(ids=ids, logps=token_logps(model, p["prompt_ids"], ids)["logps"])
    pairs.append(dict(row={k: row[k] for k in ("prompt", "chosen", "rejected")}, **entry))
t.train()
steps = [{k: h[k] for k in KEYS if k in h} for h in t.state.log_history if "loss" in h]
args.out.write_text(json.dumps(dict(pairs=pairs, steps=steps), ensure_ascii=False) + "\n")
for s in steps:
    print(s["loss"], s["grad_norm"])
