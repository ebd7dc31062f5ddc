"""Loads exports as users do: merged weights with transformers, an adapter with PEFT.

Usage: python exports.py MERGED_DIR ADAPTER_DIR EXPECTED.json, in a folder where the base model's
name can be loaded. EXPECTED.json: {"dtype", "eos", "pairs": [{"prompt", "chosen", "logps"}]}, with
`logps` the service's log-probs of the chosen answer's tokens under the adapter.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

merged_dir, adapter_dir, expected_file = sys.argv[1:]
expected = json.loads(Path(expected_file).read_text())

merged = AutoModelForCausalLM.from_pretrained(merged_dir)
assert str(merged.dtype) == expected["dtype"], merged.dtype
assert {str(p.dtype) for p in merged.parameters()} == {expected["dtype"]}
adapted = AutoPeftModelForCausalLM.from_pretrained(adapter_dir, dtype=torch.float32)
tokenizers = [AutoTokenizer.from_pretrained(d) for d in (merged_dir, adapter_dir)]


def worst(model):
    """Returns the largest relative difference of an answer's log-prob from the service's."""
    differences = []
    for pair in expected["pairs"]:
        texts = {
            json.dumps(
                [
                    t.apply_chat_template(pair["prompt"], add_generation_prompt=True)["input_ids"],
                    t.apply_chat_template(pair["prompt"] + pair["chosen"])["input_ids"],
                ]
            )
            for t in tokenizers
        }
        (text,) = texts  # both exports have the same tokenizer and template
        prompt, whole = json.loads(text)
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].float()
        n = len(prompt)
        logps = torch.log_softmax(logits, -1)[n - 1 : -1].gather(
            1, torch.tensor(whole[n:])[:, None]
        )[:, 0]
        assert len(logps) == len(pair["logps"])
        total = sum(pair["logps"])
        differences.append(abs(logps.sum().item() - total) / abs(total))
    return max(differences)


print("peft", worst(adapted))
print("merged", worst(merged.float()))

# `generate` takes its end-of-sequence tokens from generation_config.json: a head that always
# prefers that token stops at once, with another one it goes on.
assert merged.generation_config.eos_token_id == expected["eos"], merged.generation_config
start = torch.tensor([[3, 4, 5]])


def generated(token):
    class Prefers(torch.nn.Module):
        def forward(self, x):
            scores = torch.zeros(*x.shape[:-1], merged.config.vocab_size)
            scores[..., token] = 1.0
            return scores

    merged.lm_head = Prefers()
    return merged.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=6, do_sample=False
    )[0, 3:].tolist()


assert generated(expected["eos"]) == [expected["eos"]]
other = expected["eos"] + 1
assert generated(other) == [other] * 6
print("generate stops at", expected["eos"])
