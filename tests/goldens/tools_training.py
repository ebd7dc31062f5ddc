"""Trains a tiny Qwen3 with the real Qwen3 tokenizer on rows with tools and template arguments: 4 steps of TRL.

    tools_training.py TOKENIZER OUT

TOKENIZER is a folder of .ci/tokenizers. OUT gets the model before training, and expected.json: every row's token ids, and the steps.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from common import randomise, rows, trainer

SETTINGS = dict(max_steps=4, learning_rate=1e-3, max_length=1024)


def build(source, folder):
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    tok = AutoTokenizer.from_pretrained(folder)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, 400)
    model.save_pretrained(folder)


def main(source, out):
    build(source, out / "model")
    load = lambda: AutoModelForCausalLM.from_pretrained(out / "model", attn_implementation="eager", dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(out / "model")
    with tempfile.TemporaryDirectory() as scratch:
        run = trainer(load(), tok, rows("tools_pairs.jsonl"), ref=load(), out=scratch, **SETTINGS)
        pairs = [dict(prompt=p["prompt_ids"], chosen=p["chosen_ids"], rejected=p["rejected_ids"]) for p in run.train_dataset]
        run.train()
    steps = [{k: h[k] for k in ("loss", "grad_norm")} for h in run.state.log_history if "loss" in h]
    (out / "expected.json").write_text(json.dumps(dict(settings=SETTINGS, pairs=pairs, steps=steps)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
