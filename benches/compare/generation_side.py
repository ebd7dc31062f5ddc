"""transformers, or the bandwidth of reading memory, as one side of ../decoding.py.

Reads one JSON line per round from stdin, runs the round and prints its figures as JSON.

Usage: python generation_side.py MODEL.gguf f32|bf16 THREADS
       python generation_side.py bandwidth THREADS
  a model:   {"prompts": [[token ids], ...], "new_tokens": 128}, with prompts of the same length
  bandwidth: {}
Versions: tests/goldens/requirements.txt.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

what, *rest = sys.argv[1:]
torch.set_num_threads(int(rest[-1]))
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries talk on stdout


def bandwidth():
    """Returns a function that sums 512 MiB of f32 values five times, and returns the bytes per
    second of the fastest sum."""
    values = torch.ones(1 << 27, dtype=torch.float32)

    def read(_):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            values.sum()
            best = min(best, time.perf_counter() - start)
        return {"bytes_per_second": values.numel() * values.element_size() / best}

    return read


def generation(precision):
    """Returns a function that continues prompts greedily, all of them as one batch."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Times at which each new token of the batch was chosen. It never stops the batch."""

        def __init__(self):
            self.times = []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    file = Path(what)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    model.eval()
    # No token ends a text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def generate(ask):
        prompts, new_tokens, clock = torch.tensor(ask["prompts"]), ask["new_tokens"], Clock()
        start = time.perf_counter()
        texts = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = time.perf_counter()
        assert texts.shape[1] - prompts.shape[1] == len(clock.times) == new_tokens
        first, last = clock.times[0], clock.times[-1]
        return {
            "prompt_seconds": first - start,
            "decoding": len(prompts) * (new_tokens - 1) / (last - first),
            "seconds": end - start,
        }

    return generate


run = bandwidth() if what == "bandwidth" else generation(rest[0])
print("ready", file=out, flush=True)
for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), file=out, flush=True)
