#!/usr/bin/env python3
"""Measures how well `bradley curate` finds flipped labels.

For each file, share and seed, the labels of that share of the rows are flipped, and the rows are
curated through a running server. The script prints a line of JSON with the AUC of finding the
flipped rows by their out-of-fold margin (`auc`), the share of the flipped rows that are in the
tenth of the rows with the lowest margins (`in_first_tenth`), and the shares of the flipped and of
the other rows that have the verdict `probably_flipped` (`named`, `named_wrongly`).

    bradley serve --models smollm2=MODEL --data-dir /tmp/label-noise
    python3 benches/label_noise.py --bradley target/release/bradley src/cli/demo/pairs.jsonl …

It needs Python's standard library only.
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile
import time


def flipped(rows, share, seed):
    """Returns the rows with a share of their labels flipped, and the positions of these."""
    positions = random.Random(seed).sample(range(len(rows)), round(share * len(rows)))
    noisy = [dict(row) for row in rows]
    for i in positions:
        noisy[i]["chosen"], noisy[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    return noisy, set(positions)


def auc(scores, positives):
    """Returns the probability that a positive has a higher score than a negative; ties count half."""
    yes = [s for i, s in enumerate(scores) if i in positives]
    no = [s for i, s in enumerate(scores) if i not in positives]
    wins = sum((a > b) + 0.5 * (a == b) for a in yes for b in no)
    return wins / (len(yes) * len(no))


def measure(args, path, share, seed):
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = rows[: args.rows] if args.rows else rows
    noisy, positions = flipped(rows, share, seed)
    with tempfile.TemporaryDirectory() as folder:
        data, out = pathlib.Path(folder, "pairs.jsonl"), pathlib.Path(folder, "out.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in noisy))
        command = [args.bradley, "curate", "--data", data, "--out", out, "--server", args.server]
        command += ["--folds", str(args.folds), "--format", "json", *args.flags]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        curated = [json.loads(line) for line in out.read_text().splitlines()]
    scored = [i for i, row in enumerate(curated) if "margin" in row]
    margins = [curated[i]["margin"] for i in scored]
    found = {place for place, i in enumerate(scored) if i in positions}
    lowest = sorted(range(len(scored)), key=lambda place: margins[place])
    first = lowest[: max(1, round(len(scored) / 10))]
    verdicts = [curated[i]["verdict"] for i in scored]
    named = {place for place, verdict in enumerate(verdicts) if verdict == "probably_flipped"}
    return {
        "file": path.name,
        "rows": len(scored),
        "flipped": len(found),
        "seed": seed,
        "auc": auc([-m for m in margins], found),
        "in_first_tenth": len(found & set(first)) / len(found),
        "best_in_first_tenth": min(1.0, len(first) / len(found)),
        "precision_in_first_tenth": len(found & set(first)) / len(first),
        "named": len(found & named) / len(found),
        "named_wrongly": len(named - found) / (len(scored) - len(found)),
        "agrees": verdicts.count("agrees"),
        "doubtful": verdicts.count("doubtful"),
        "probably_flipped": verdicts.count("probably_flipped"),
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--bradley", default="bradley")
    parser.add_argument("--server", default="http://127.0.0.1:50051")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--rows", type=int, help="use the first ROWS rows of each file")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="further flags of `bradley curate`, last")
    args = parser.parse_args()
    for path in args.files:
        for share in args.shares:
            for seed in args.seeds:
                print(json.dumps(measure(args, path, share, seed)), flush=True)


if __name__ == "__main__":
    main()
