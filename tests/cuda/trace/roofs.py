"""Compares each kernel with the GPU's bandwidth and arithmetic:
roofs.py TRACE.tsv --shape 8b --bandwidth 4800 --flops 989 [--gflop G --seen S]

TRACE.tsv is the output of trace.cpp for LoRA steps in bf16 on a model with a shape of
benches/gpu.py. --bandwidth is in GB/s and --flops in TFLOP/s, from the data sheet for example. The
bytes that a kernel must move are counted from its shape, every input and every output once; the
length of the row is the grid of the last `embed`. --gflop is `gflop` of the lines that offline.rs
prints, summed over the rounds of the trace. --seen is the number of pairs of tokens that attention
compares in one pass, summed over all steps of the trace. With both, the arithmetic of attention and
of the GEMMs is known, too. The larger share of a peak is the one that limits the kernel. The table
is markdown.
"""

import argparse
from collections import defaultdict

from roofline import BLAS, read

SHAPES = {"1b": (2048, 8192, 16, 32, 8, 64), "8b": (4096, 14336, 32, 32, 8, 128)}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("trace")
parser.add_argument("--shape", choices=SHAPES, required=True)
parser.add_argument("--bandwidth", type=float, required=True)
parser.add_argument("--flops", type=float, required=True)
parser.add_argument("--gflop", type=float, default=0)
parser.add_argument("--seen", type=float, default=0)
args = parser.parse_args()
hidden, forward, layers, heads, keys, dim = SHAPES[args.shape]
width, row = heads * dim, (heads + 2 * keys) * dim


def moved(name, grid, tokens):
    """Returns the bytes that a launch moves, or None if they do not depend on the shape alone."""
    kind, per = (
        name.removesuffix("_bf16"),
        {
            "embed": hidden * (2 + 4),
            "rms_norm": hidden * (4 + 2),
            "rms_norm_backward": hidden * (4 + 2 + 4 + 4),
            "swiglu": forward * (2 * 2 + 2),
            "swiglu_backward": forward * (2 * 2 + 2 + 2 * 2),
            "rope": (heads + keys) * dim * (2 + 2),
            "cast": hidden * (4 + 2),
            "attention_delta": width * (2 + 2) + heads * 4,
            "attention_sum": 2 * (width * 4 + keys * dim * 2),
            f"attention_mma_{dim}": row * 2 + width * 2 + heads * 4,
            f"attention_dq_mma_{dim}": row * 2 + width * (2 + 2) + heads * 8,
            f"attention_dkv_mma_{dim}": row * 2 + width * 2 + heads * 8 + 2 * width * 4,
        },
    )
    if kind not in per:
        return None
    rows = grid if kind in ("embed", "rms_norm", "rms_norm_backward") else tokens
    return rows * per[kind]


# Multiplications and additions of a step, divided by the number of compared pairs of tokens and by
# the width of all heads. Forward pass: S and O, computed twice (policy and reference). Backward
# pass: S, dP and dQ; then S, dP, dV and dK.
products = {
    f"attention_mma_{dim}": 2 * 2 * 2,
    f"attention_dq_mma_{dim}": 2 * 3,
    f"attention_dkv_mma_{dim}": 2 * 4,
}
arithmetic = {name: n * width * layers * args.seen for name, n in products.items()}
# offline.rs counts the attention of a step as 4.5 forward passes.
arithmetic["products (cuBLAS)"] = (
    args.gflop * 1e9 - 4.5 * 4 * width * layers * args.seen if args.gflop and args.seen else 0
)

records, _ = read(args.trace)
groups, tokens = defaultdict(lambda: [0, 0, 0]), 0
for r in records:
    if r.kind != "kernel":
        continue
    grid = int(r.grid.split("×")[0])
    if r.name.startswith("embed"):
        tokens = grid
    group = groups["products (cuBLAS)" if BLAS.search(r.name) else r.name]
    group[0] += 1
    group[1] += r.ns
    group[2] += moved(r.name, grid, tokens) or 0
busy = sum(ns for _, ns, _ in groups.values())
print(
    "| kernel | launches | ms | of all | GB/s | of the bandwidth | TFLOP/s "
    "| of the arithmetic |\n|---|---|---|---|---|---|---|---|"
)
for name, (n, ns, size) in sorted(groups.items(), key=lambda g: -g[1][1]):
    rate, work = size / ns, arithmetic.get(name, 0) / ns / 1e3
    memory = [f"{rate:.0f}", f"{rate / args.bandwidth:.0%}"] if size else ["", ""]
    flops = [f"{work:.0f}", f"{work / args.flops:.0%}"] if work else ["", ""]
    print(
        "|", " | ".join([name, str(n), f"{ns / 1e6:.1f}", f"{ns / busy:.1%}", *memory, *flops]), "|"
    )
