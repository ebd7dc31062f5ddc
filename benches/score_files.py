"""Compares `bradley score-files` with the engine alone and with transformers, in alternating rounds.

  cargo build --release --benches --bins
  python benches/score_files.py MODEL.gguf PAIRS.jsonl [--rounds 5] [--pairs-per-round 16]
      [--max-length 512] [--precisions f32 bf16] [--without-transformers]

Each round scores the same rows: by `score-files` through a server on loopback, from a JSONL file to
a Parquet part; by the engine in a process of its own, from memory; and by transformers as
compare/trl_side.py does. The policy is LoRA of rank 16, the reference its base model, whose
log-probs are computed anew each time. Loading is left out, the start of the command is not. The last
line of a precision is the number of answers a second in rows with eight answers to a prompt
(`completions`). The Python needs tests/goldens/requirements.txt for transformers.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SERVER = "http://127.0.0.1:50971"

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--bradley", default=str(ROOT / "target/release/bradley"))
parser.add_argument("--offline", help="the benchmark; default: the newest in target/release/deps")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--pairs-per-round", type=int, default=16)
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"])
parser.add_argument("--without-transformers", action="store_true")
args = parser.parse_args()


def newest_offline():
    built = glob.glob(str(ROOT / "target/release/deps/offline-*"))
    return max((p for p in built if not p.endswith(".d")), key=os.path.getmtime)


class Side:
    """A process that runs a round for each line."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        ready = self.process.stdout.readline().split()
        assert ready[:1] == ["ready"], ready
        self.rows = int(ready[1]) if len(ready) > 1 else None

    def seconds(self, start, end):
        self.process.stdin.write(f"{start} {end}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def run(*command):
    subprocess.run(
        [args.bradley, *command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "BRADLEY_SERVER": SERVER},
    )


def score_files(policy, source, out):
    start = time.monotonic()
    run("score-files", "--in", str(source), "--out", str(out), "--policy", policy,
        "--max-length", str(args.max_length))  # fmt: skip
    return time.monotonic() - start


def measure(precision, rows, folder):
    server = subprocess.Popen(
        [args.bradley, "serve", "--models", f"bench={args.model}", "--data-dir", folder / "data",
         "--listen", SERVER.removeprefix("http://"), "--http-listen", "off",
         "--precision", precision, "--reference-cache-tokens", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(120):
            assert server.poll() is None, "the server has ended: is its port in use?"
            if subprocess.run([args.bradley, "health", "--server", SERVER],
                              capture_output=True).returncode == 0:  # fmt: skip
                break
            time.sleep(0.5)
        else:
            raise SystemExit("the server does not answer")
        assert server.poll() is None, "the server has ended: is its port in use?"
        train = folder / "train.jsonl"
        train.write_text("\n".join(rows[:4]))
        run("train", "--data", str(train), "--policy", "bench", "--rank", "16", "--alpha", "32",
            "--batch-size", "4", "--max-length", "128", "--max-steps", "1", "--watch")  # fmt: skip
        n = args.pairs_per_round
        offline = Side([args.offline or newest_offline(), args.model, args.pairs, "score",
                        precision, "8", str(args.max_length)])  # fmt: skip
        assert offline.rows == len(rows), "leave out the rows whose prompts are too long"
        sides = {"engine": offline}
        if not args.without_transformers:
            sides["transformers"] = Side([sys.executable, HERE / "compare/trl_side.py", args.model,
                                          args.pairs, "score", precision, "4",
                                          str(args.max_length)])  # fmt: skip
        seconds = {name: [] for name in ["score-files", *sides]}
        for r in range(args.rounds + 1):
            start = r * n % (len(rows) - n + 1)
            source = folder / f"round-{r}.jsonl"
            source.write_text("\n".join(rows[start : start + n]) + "\n")
            order = ["score-files", *sides]
            for name in order if r % 2 == 0 else reversed(order):
                if name == "score-files":
                    took = score_files("@last", source, folder / f"out-{r}")
                else:
                    took = sides[name].seconds(start, start + n)
                # The first round touches memory for the first time.
                if r > 0:
                    seconds[name].append(took)
            print(precision, r, {k: v[-1:] for k, v in seconds.items()}, file=sys.stderr)
        for side in sides.values():
            side.stop()
        answers = shared_prompts(rows[:n], folder)
        rates = {name: n / statistics.median(took) for name, took in seconds.items()}
        ratios = {
            name: statistics.median(b / a for a, b in zip(seconds["score-files"], took))
            for name, took in seconds.items()
        }
        for name in seconds:
            print(f"| {precision} | {name} | {rates[name]:.2f} | {ratios[name]:.3f} |")
        print(f"| {precision} | answers a second, 8 to a prompt | {answers:.2f} | |", flush=True)
    finally:
        server.kill()
        server.wait()


def shared_prompts(rows, folder):
    """Returns the answers that are scored in a second if each prompt has eight."""
    source = folder / "shared.jsonl"
    answers = [json.loads(row)[side] for row in rows for side in ("chosen", "rejected")]
    with source.open("w") as file:
        for i in range(len(rows) // 4):
            row = json.loads(rows[i])
            completions = (answers[2 * i :] + answers)[:8]
            file.write(json.dumps({"prompt": row["prompt"], "completions": completions}) + "\n")
    took = score_files("@last", source, folder / "shared")
    return 8 * (len(rows) // 4) / took


def main():
    rows = [line for line in Path(args.pairs).read_text().splitlines() if line.strip()]
    print("| precision | side | pairs/s | score-files as a multiple of it |\n|---|---|---|---|")
    for precision in args.precisions:
        with tempfile.TemporaryDirectory() as folder:
            measure(precision, rows, Path(folder))


main()
