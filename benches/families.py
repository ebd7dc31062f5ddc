"""Compares the engine's speed on other families with that on a Llama of the same size.

  cargo build --release --benches
  python benches/families.py TOKENIZER_FOLDER PAIRS.jsonl [--rounds 5] [--layers 6]
      [--pairs-a-round 2] [--models DIR] [--only gemma3-1b:train-lora:f32 ...]

The models have the shapes of Gemma 3 1B and Phi-4-mini but only --layers layers, and random
weights; each has a Llama with the same sizes beside it. transformers writes them once. The rows
are the same for all of them, so the ratio of GFLOP/s is that of equal work: `gflop` in
`benches/offline.rs` counts only GEMMs, and what a family computes besides (norms, soft-caps,
windows) lowers its figure. Two processes alternate, a round each. The Python needs
tests/goldens/requirements.txt.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAKE = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
tokenizer, config, folder = sys.argv[1:]
config = json.loads(config)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
tokenizer.save_pretrained(folder)
torch.manual_seed(1)
special = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.eos_token_id)
config = AutoConfig.for_model(config.pop("model_type"), **special, **config)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder)
"""

# The sizes that a family and its Llama share.
SIZES = {
    "gemma3-1b": dict(
        hidden_size=1152,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "phi4-mini": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=200064,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
}
FAMILIES = {
    "gemma3-1b": dict(
        model_type="gemma3_text",
        query_pre_attn_scalar=256,
        sliding_window=512,
        rms_norm_eps=1e-6,
    ),
    "phi4-mini": dict(
        model_type="phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=4096,
            short_factor=[1.0] * 48,
            long_factor=[1.0 + i / 10 for i in range(48)],
        ),
    ),
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("tokenizer")
parser.add_argument("pairs")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--pairs-a-round", type=int, default=2)
parser.add_argument("--models", type=Path, default=Path("target/bench-families"))
parser.add_argument("--only", nargs="*", metavar="SHAPE:WHAT:PRECISION")
args = parser.parse_args()

built = [
    p
    for p in glob.glob(str(ROOT / "target/release/deps/offline-*"))
    if os.access(p, os.X_OK) and not p.endswith(".d")
]
if not built:
    sys.exit("the benchmark is not built: cargo build --release --benches")
OFFLINE = max(built, key=os.path.getmtime)


def model(shape, family):
    """Returns the folder of a model, which is made if it is missing."""
    kind = family["model_type"]
    folder = args.models / f"{shape}-{args.layers}-{kind}"
    # The weights are written last.
    if not (folder / "model.safetensors").exists():
        config = json.dumps({**SIZES[shape], **family, "num_hidden_layers": args.layers})
        subprocess.run(
            [sys.executable, "-c", MAKE, args.tokenizer, config, str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


class Side:
    """A process of the benchmark `offline`, which runs one round for each line."""

    def __init__(self, folder, what, precision):
        self.process = subprocess.Popen(
            [OFFLINE, str(folder), args.pairs, what, precision, str(args.pairs_a_round), "512"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while not (line := self.process.stdout.readline()).startswith("ready"):
            if not line:
                sys.exit(f"{OFFLINE} failed on {folder}")
        self.rates = []

    def round(self, number):
        """Runs a round. The first one, in which memory is touched first, is not counted."""
        start = number * args.pairs_a_round
        self.process.stdin.write(f"{start} {start + args.pairs_a_round}\n")
        self.process.stdin.flush()
        figures = json.loads(self.process.stdout.readline())
        if number:
            self.rates.append(figures["gflop"] / figures["seconds"])

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


print("| shape | work | GFLOP/s | GFLOP/s of a Llama | ratio, median (lowest to highest) |")
print("|---|---|---|---|---|")
for shape, family in FAMILIES.items():
    for what in ("train-lora", "score"):
        for precision in ("f32", "bf16"):
            if args.only and f"{shape}:{what}:{precision}" not in args.only:
                continue
            llama = model(shape, {"model_type": "llama"})
            sides = [Side(model(shape, family), what, precision), Side(llama, what, precision)]
            for number in range(args.rounds + 1):
                for side in sides if number % 2 else sides[::-1]:
                    side.round(number)
            for side in sides:
                side.stop()
            ratios = [a / b for a, b in zip(sides[0].rates, sides[1].rates)]
            print(
                f"| {shape} | {what} {precision} | {statistics.median(sides[0].rates):.1f} "
                f"| {statistics.median(sides[1].rates):.1f} | {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}) |",
                flush=True,
            )
