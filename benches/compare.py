"""Compares Bradley with TRL and transformers on the same rows, in alternating rounds.

  cargo build --release --benches --bins
  python benches/compare.py MODEL.gguf PAIRS.jsonl [--rounds 5] [--train-pairs 4]
      [--train-steps 2] [--score-pairs 8] [--out FILE.jsonl]

PAIRS.jsonl has the columns prompt, chosen and rejected, as lists of messages. Each round takes
other rows: five rounds need 40 rows, with --train-steps 4 they need 80. The Python needs
tests/goldens/requirements.txt, grpcio-tools and googleapis-common-protos. Every measurement is one
JSON line in --out; the tables at the end are markdown, for docs/benchmarks.
Training figures leave loading and tokenising out on both sides. Each measurement has a process of
its own, except those of Bradley's servers, which run all the time.
"""

import argparse
import glob
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "compare"))

from service import Service, pair, pb

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--train-pairs", type=int, default=4, help="pairs of a step")
parser.add_argument(
    "--train-steps",
    type=int,
    default=2,
    help="steps of a round. In the first step a process touches its memory for the first time, so "
    "the later steps have a line of their own, too",
)
parser.add_argument("--score-pairs", type=int, default=8)
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--out", default="compare.jsonl")
parser.add_argument(
    "--only",
    choices=["rounds", "own", "interleaving", "large"],
    help="only the comparison, only what needs no other side, only scoring while a job trains, or "
    "only the 1.7B model",
)
parser.add_argument(
    "--match",
    nargs="*",
    metavar="WHAT:PRECISION",
    help="of the comparison, only these: train-lora:f32, train-lora:bf16, train-full:f32, "
    "score:f32, score:bf16",
)
args = parser.parse_args()
out = open(args.out, "a")


def newest(pattern):
    found = [
        p for p in glob.glob(str(ROOT / pattern)) if os.access(p, os.X_OK) and not p.endswith(".d")
    ]
    if not found:
        sys.exit(f"{pattern} is not built: cargo build --release --benches --bins")
    return max(found, key=os.path.getmtime)


OFFLINE = newest("target/release/deps/offline-*")
BRADLEY = str(ROOT / "target/release/bradley")


def side(command, lines):
    """Runs a side's program, gives it a line for each round, and returns its answers."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(
        command, input="".join(l + "\n" for l in lines), capture_output=True, text=True, env=env
    )
    answers = [json.loads(l) for l in done.stdout.splitlines() if l.startswith("{")]
    if done.returncode or len(answers) != len(lines):
        sys.exit(f"{command} failed:\n{done.stderr[-3000:]}")
    return answers


def note(name, precision, which, answer):
    answer = dict(answer, name=name, precision=precision, side=which)
    answer.setdefault("rate", answer.get("pairs", 0) / answer["seconds"])
    print(json.dumps(answer), file=out, flush=True)
    print(
        f"{name:24} {precision:5} {which:12} {answer['rate']:8.3f}/s  "
        f"{answer.get('peak_bytes', 0) / 1e9:6.2f} GB",
        flush=True,
    )
    results.setdefault((name, precision), {}).setdefault(which, []).append(answer)
    pairs = answer.get("pairs", 0) - args.train_pairs
    if answer.get("first_step") and pairs > 0:
        left = answer["seconds"] - answer["first_step"]
        later = {
            "rate": pairs / left,
            "seconds": left,
            "gflop": answer.get("gflop", 0) - answer.get("first_gflop", 0),
            "peak_bytes": answer["peak_bytes"],
        }
        results.setdefault((f"{name}, from the second step on", precision), {}).setdefault(
            which, []
        ).append(later)


results = {}


def rows_for_both():
    """Writes the rows whose prompt both sides accept to a file, and returns its path and them."""
    kept = []
    for line in Path(args.pairs).read_text().splitlines():
        row = json.loads(line)
        if sum(len(m["content"]) for m in row["prompt"]) < 2.5 * args.max_length:
            kept.append(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}))
    path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    path.write_text("\n".join(kept) + "\n")
    return path, [json.loads(l) for l in kept]


def rounds(path, rows, servers):
    def trl(mode, precision, first, n, batch):
        return side(
            [
                sys.executable,
                str(HERE / "compare/trl_side.py"),
                args.model,
                str(path),
                mode,
                precision,
                str(batch),
                str(args.max_length),
            ],
            [f"{first} {first + n}"],
        )[0]

    def own(mode, precision, first, n, batch):
        return side(
            [OFFLINE, args.model, str(path), mode, precision, str(batch), str(args.max_length)],
            [f"{first} {first + n}"],
        )[0]

    def wanted(mode, precision):
        return not args.match or f"{mode}:{precision}" in args.match

    for r in range(args.rounds):
        for mode, precision in (
            ("train-lora", "f32"),
            ("train-lora", "bf16"),
            ("train-full", "f32"),
        ):
            if not wanted(mode, precision):
                continue
            batch, n = args.train_pairs, args.train_pairs * args.train_steps
            for which, run in (
                (("TRL", trl), ("bradley", own)) if r % 2 == 0 else (("bradley", own), ("TRL", trl))
            ):
                note(mode, precision, which, run(mode, precision, r * n, n, batch))
        for precision in ("f32", "bf16"):
            if not wanted("score", precision):
                continue
            n = args.score_pairs
            first = r * n
            note("score", precision, "transformers", trl("score", precision, first, n, n))
            note("score", precision, "bradley", servers[precision].score(rows[first : first + n]))
            note("score", precision, "offline", own("score", precision, first, n, n))
            note(
                "score", precision, "warm cache", servers[precision].score(rows[first : first + n])
            )


def answers(server, precision, rows, r):
    """Scores eight short answers to one prompt of about 400 tokens: one by one, each in a pair with
    the next, in four pairs, and in one request."""
    words = " ".join(m["content"] for row in rows for m in row["chosen"])[r * 1700 : (r + 1) * 1700]
    shorts = [
        [{"role": "assistant", "content": row["chosen"][0]["content"][:60]}] for row in rows[:8]
    ]

    def prompt(kind):
        return [{"role": "user", "content": f"{kind} {r}: {words}"}]

    def timed(which, f):
        start = time.perf_counter()
        f()
        note("8 answers", precision, which, {"seconds": time.perf_counter() - start, "pairs": 8})

    s = pb["scoring"]
    timed("one by one", lambda: [server.completions(prompt("a"), [x]) for x in shorts])

    def separate_pairs(kind, pairs):
        for a, b in pairs:
            server.scoring.ScorePairs(
                s.ScorePairsRequest(
                    options=server.options(),
                    pairs=[pair("p", {"prompt": prompt(kind), "chosen": a, "rejected": b})],
                )
            )

    timed("eight pairs", lambda: separate_pairs("d", zip(shorts, shorts[1:] + shorts[:1])))
    timed("four pairs", lambda: separate_pairs("b", zip(shorts[::2], shorts[1::2])))
    timed("in one", lambda: server.completions(prompt("c"), shorts))


def interleaving(server, precision, rows, windows=3, requests=16, load=1 / 6):
    """Measures the latency of single pairs and the speed of training, alone and together, in
    alternating windows. Pairs arrive at random (Poisson), whether or not earlier ones were
    answered, at a rate that keeps the device busy for a sixth of the time."""
    from concurrent.futures import ThreadPoolExecutor

    t = pb["training"]
    pairs = rows[:40]
    rng = random.Random(7)

    def one(i):
        return server.score(pairs[i % len(pairs) : i % len(pairs) + 1])["seconds"]

    def arrivals(mean):
        start, times = time.perf_counter(), []
        with ThreadPoolExecutor(32) as pool:
            due = 0.0
            for i in range(requests):
                due += rng.expovariate(1 / mean)
                time.sleep(max(0.0, start + due - time.perf_counter()))
                times.append(pool.submit(one, i))
            return [f.result() for f in times]

    def change(job, after):
        """Waits for a step after `after`, and returns its time, the job's tokens and the step."""
        while True:
            progress = server.training.GetTrainingJob(t.GetTrainingJobRequest(name=job)).progress
            if progress.step > after:
                return time.perf_counter(), progress.tokens, progress.step
            time.sleep(0.03)

    def window(job, during):
        """Returns tokens, seconds and steps between the ends of two steps, around `during`."""
        start, tokens, step = change(
            job, server.training.GetTrainingJob(t.GetTrainingJobRequest(name=job)).progress.step
        )
        during()
        last = server.training.GetTrainingJob(t.GetTrainingJobRequest(name=job)).progress.step
        end, until, last = change(job, last)
        return until - tokens, end - start, last - step

    for i in range(len(pairs)):
        one(i)  # the reference cache is warm in both cases
    service = statistics.mean(one(i) for i in range(len(pairs)))
    seconds = requests * service / load
    job = server.submit(rows[:60], steps=100000)
    change(job, 3)
    server.training.PauseTrainingJob(t.PauseTrainingJobRequest(name=job))
    idle, busy, alone, together = [], [], [], []
    for _ in range(windows):
        idle += arrivals(service / load)
        server.training.ResumeTrainingJob(t.ResumeTrainingJobRequest(name=job))
        alone.append(window(job, lambda: time.sleep(seconds)))
        together.append(window(job, lambda: busy.extend(arrivals(service / load))))
        server.training.PauseTrainingJob(t.PauseTrainingJobRequest(name=job))
    server.training.CancelTrainingJob(t.CancelTrainingJobRequest(name=job))
    p99 = lambda xs: sorted(xs)[min(len(xs) - 1, int(0.99 * len(xs)))]
    rate = lambda windows: sum(w[0] for w in windows) / sum(w[1] for w in windows)
    figures = {
        "requests": len(busy),
        "idle_p50": statistics.median(idle),
        "idle_p99": p99(idle),
        "busy_p50": statistics.median(busy),
        "busy_p99": p99(busy),
    }
    figures |= {
        "tokens_per_second_alone": rate(alone),
        "tokens_per_second_with_scoring": rate(together),
        "kept": rate(together) / rate(alone),
    }
    figures |= {
        "steps": [sum(w[2] for w in alone), sum(w[2] for w in together)],
        "kept_by_window": [rate([b]) / rate([a]) for a, b in zip(alone, together)],
    }
    figures["limit"] = 2 * figures["idle_p99"] + sum(w[1] for w in alone) / sum(w[2] for w in alone)
    print(
        json.dumps({"name": "interleaving", "precision": precision, **figures}),
        file=out,
        flush=True,
    )
    print("interleaving", precision, json.dumps(figures), flush=True)


def lengths(path):
    for precision in ("f32", "bf16"):
        for line in subprocess.run(
            [OFFLINE, args.model, str(path), "lengths", precision, "1"],
            input="0 1\n",
            capture_output=True,
            text=True,
        ).stdout.splitlines():
            if line.startswith("{"):
                print(
                    json.dumps(dict(json.loads(line), name="lengths", precision=precision)),
                    file=out,
                    flush=True,
                )
                print("lengths", precision, line)


LARGE = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
gguf, folder = sys.argv[1:]
directory, _, file = gguf.rpartition("/")
tokenizer = AutoTokenizer.from_pretrained(directory or ".", gguf_file=file)
tokenizer.save_pretrained(folder)
config = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=49152, max_position_embeddings=8192,
    tie_word_embeddings=True, dtype="bfloat16")
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained(folder)
"""


def large(rows):
    """Measures LoRA training of a model of SmolLM2-1.7B's shape with random weights, through the
    service."""
    folder = tempfile.mkdtemp()
    subprocess.run(
        [sys.executable, "-c", LARGE, args.model, folder], check=True, capture_output=True
    )
    server = Service(BRADLEY, folder, "bf16", rows, args.max_length)
    try:
        job = server.submit(rows[:4], steps=4)
        start = time.perf_counter()
        server.wait(job)
        note(
            "1.7B LoRA",
            "bf16",
            "bradley",
            {"seconds": time.perf_counter() - start, "pairs": 4, "peak_bytes": server.peak()},
        )
    finally:
        server.stop()
        shutil.rmtree(folder)


def table():
    print(
        "\n| what | precision | side | rate/s: median (min–max) | GFLOP/s | peak RSS GB "
        "| ratio to the first side: median (min–max) |\n|---|---|---|---|---|---|---|"
    )
    for (name, precision), sides in results.items():
        base = (
            next(iter(sides.values()))
            if "TRL" not in sides and "transformers" not in sides
            else sides.get("TRL") or sides.get("transformers")
        )
        for which, all_ in sides.items():
            rates = [a["rate"] for a in all_]
            ratios = [a["rate"] / b["rate"] for a, b in zip(all_, base)]
            flops = [a["gflop"] / a["seconds"] for a in all_ if a.get("gflop")]
            spread = lambda xs, f: f"{statistics.median(xs):{f}} ({min(xs):{f}}–{max(xs):{f}})"
            peak = max(a.get("peak_bytes", 0) for a in all_) / 1e9
            print(
                f"| {name} | {precision} | {which} | {spread(rates, '.3f')} "
                f"| {statistics.median(flops) if flops else 0:.0f} | {peak:.2f} "
                f"| {spread(ratios, '.2f')} |"
            )


path, rows = rows_for_both()
only_training = (
    args.only == "rounds" and args.match and not any(m.startswith("score") for m in args.match)
)
both = {"f32": 50100, "bf16": 50101}
servers = (
    {p: Service(BRADLEY, args.model, p, rows, args.max_length, port) for p, port in both.items()}
    if args.only != "large" and not only_training
    else {}
)
try:
    if args.only in (None, "rounds"):
        rounds(path, rows, servers)
    if args.only in (None, "own"):
        for precision, server in servers.items():
            for r in range(args.rounds):
                answers(server, precision, rows, r)
        lengths(path)
    if args.only in (None, "own", "interleaving"):
        for precision, server in servers.items():
            interleaving(server, precision, rows)
    if args.only in (None, "large"):
        large(rows)
finally:
    for server in servers.values():
        server.stop()
table()
