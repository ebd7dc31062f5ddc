"""Compares Bradley with TRL and transformers on one NVIDIA GPU, in alternating rounds.

  python benches/gpu.py PROGRAMS TOKENIZER_FOLDER PAIRS.jsonl --shape 8b --what train score
      [--rounds 3] [--models /dev/shm] [--out gpu.jsonl]

It measures LoRA training, and scoring through gRPC at several loads. PROGRAMS is the folder with
the unpacked archive of `tests/cuda/device pack`. The models have Llama 3's shapes, random weights
(made once, on the GPU) and the tokenizer's vocabulary padded to 128,256. PAIRS.jsonl has the
columns prompt, chosen and rejected, as lists of messages; each round takes 32 other rows. The
Python needs torch, transformers, peft, trl 1.16 with datasets, grpcio-tools,
googleapis-common-protos and nvidia-ml-py, and liger-kernel for the configurations of --trl that end
in `l`, of which the default has one. Every measurement is one JSON line in --out; the tables at the
end are markdown, for docs/benchmarks.

Training is LoRA of rank 16 on all linear layers, in bf16, with steps of 16 pairs and max_length
2048. First it looks for TRL's fastest configuration. Peak memory is sampled: the memory that the
driver (NVML) reports for the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "compare"))

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("programs", type=Path)
parser.add_argument("tokenizer")
parser.add_argument("pairs")
parser.add_argument(
    "--shape", choices=["tiny", "1b", "8b", "8b-2-layers"], nargs="+", default=["8b"]
)
parser.add_argument("--what", choices=["train", "score"], nargs="*", default=["train", "score"])
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--max-length", type=int, default=2048)
parser.add_argument("--models", type=Path, default=Path("/dev/shm"))
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--row-tokens", type=int, help="tokens of a packed row of Bradley's")
parser.add_argument(
    "--loads",
    type=int,
    nargs="+",
    default=[1, 4, 16, 64],
    help="clients that ask for a pair at a time",
)
parser.add_argument("--seconds", type=float, default=6, help="of each load")
parser.add_argument(
    "--trl",
    nargs="*",
    default=["1", "2", "4", "1c", "4c", "8c", "4l"],
    help="its configurations: batch, c: gradient checkpointing, l: Liger's layers",
)
parser.add_argument(
    "--transformers", type=int, nargs="+", default=[4, 8, 16], help="its batches of pairs to score"
)
parser.add_argument("--out", default="gpu.jsonl")
args = parser.parse_args()
out = open(args.out, "a")
# Bytes that Bradley's engine needs on the GPU, for any of the shapes.
ENGINE_NEEDS = 45e9

MAKE = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
tokenizer, shape, folder = sys.argv[1:]
hidden, forward, layers, heads, tied = {
    "tiny": (256, 512, 2, 8, True),
    "1b": (2048, 8192, 16, 32, True),
    "8b": (4096, 14336, 32, 32, False),
    "8b-2-layers": (4096, 14336, 2, 32, False),
}[shape]
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
torch.manual_seed(1)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, dtype="bfloat16"))
model.save_pretrained(folder)
"""


def note(**figures):
    print(json.dumps(figures), file=out, flush=True)
    print(json.dumps({k: v for k, v in figures.items() if k != "margins"}), flush=True)
    return figures


def model(shape):
    folder = args.models / f"bradley-bench-{shape}"
    if not (folder / "config.json").exists():
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", MAKE, args.tokenizer, shape, str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        note(what="model made", shape=shape, seconds=time.perf_counter() - start)
    return folder


def usable_rows():
    """Writes the rows whose prompt both sides accept to a file. 32 tokens are left free, because
    `load` makes prompts a little longer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = []
    for line in Path(args.pairs).read_text().splitlines():
        row = {k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")}
        if (
            len(
                tokenizer(
                    tokenizer.apply_chat_template(
                        row["prompt"], tokenize=False, add_generation_prompt=True
                    )
                )["input_ids"]
            )
            < args.max_length - 32
        ):
            rows.append(row)
    path = args.models / "bradley-bench-pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path, rows


class Sampler:
    """Samples the memory that each process has on the GPU, and keeps the maximum."""

    def __init__(self):
        self.peaks, self.total = {}, 0
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
            self.total = pynvml.nvmlDeviceGetMemoryInfo(self.handle).total
            threading.Thread(target=self.run, daemon=True).start()
        except Exception as e:
            print("no NVML:", e, flush=True)

    def run(self):
        while True:
            try:
                for p in self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle):
                    self.peaks[p.pid] = max(self.peaks.get(p.pid, 0), p.usedGpuMemory or 0)
            except self.nvml.NVMLError as e:
                print("NVML:", e, flush=True)
            time.sleep(0.3)  # more often slows the other processes' calls of the driver

    def take(self, pid):
        return self.peaks.pop(pid, None)


class Side:
    """A process that reads lines and answers each with a line of JSON."""

    def __init__(self, command, env=()):
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, **dict(env)),
        )

    def ask(self, line):
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return self.read()

    def read(self):
        for line in self.child.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                seen = sampler.take(self.child.pid)
                return dict(answer, peak_bytes=seen) if seen else answer
        raise SystemExit(f"{self.child.args} ended: {self.child.wait()}")

    def close(self):
        self.child.stdin.close()
        self.child.wait(60)


def trl(folder, path, mode, *adapter):
    side = Side(
        [
            sys.executable,
            str(HERE / "compare/trl_gpu.py"),
            str(folder),
            str(path),
            mode,
            str(args.max_length),
            *adapter,
        ]
    )
    print("transformers ready after", side.read()["ready"], flush=True)
    return side


class Engine:
    """Bradley's engine. One process serves all rounds if `room`, the bytes that TRL leaves free,
    suffices. Otherwise each round has its own, because TRL needs the whole GPU."""

    def __init__(self, folder, path, room):
        rows = [str(args.row_tokens)] if args.row_tokens else []
        self.command = [
            str(args.programs / "offline"),
            str(folder),
            str(path),
            "train-lora",
            "bf16",
            "16",
            str(args.max_length),
            *rows,
        ]
        self.stays, self.side = room > ENGINE_NEEDS, None

    def round(self, first):
        if self.side is None:
            self.side = Side(self.command, {"BRADLEY_BENCH_DEVICE": args.device}.items())
        self.side.ask(f"{first} {first + 16}")
        answer = self.side.ask(f"{first + 16} {first + 32}")
        if not self.stays:
            self.close()
        return answer

    def close(self):
        if self.side:
            self.side.close()
        self.side = None


def training(shape, folder, path):
    def of_trl(config, first):
        settings = {
            "batch": int(config.rstrip("cl")),
            "checkpointing": config.endswith("c"),
            "liger": config.endswith("l"),
            "first": first,
        }
        return theirs.ask(json.dumps(settings))

    # A process's first round is slow whatever its configuration, so that one is tried twice.
    theirs, tried = trl(folder, path, "train"), {}
    for config in [args.trl[0], *args.trl]:
        tried[config] = note(
            what="train", shape=shape, side="TRL, tried", config=config, **of_trl(config, 0)
        )
    ran = [c for c, a in tried.items() if "seconds" in a]
    if not ran:
        sys.exit("TRL runs in none of these configurations")
    best = min(ran, key=lambda c: tried[c]["seconds"])
    print(f"TRL's best: {best}", flush=True)
    answers = {"TRL": [], "bradley": []}
    engine = Engine(folder, path, sampler.total - tried[best].get("peak_bytes", 0))
    for r in range(args.rounds):
        first = r * 32
        for which in ("TRL", "bradley") if r % 2 == 0 else ("bradley", "TRL"):
            answer = of_trl(best, first) if which == "TRL" else engine.round(first)
            answers[which].append(
                note(
                    what="train",
                    shape=shape,
                    side=which,
                    config=best if which == "TRL" else "",
                    round=r,
                    **answer,
                )
            )
    theirs.close()
    engine.close()
    rounds = [(t, b) for t, b in zip(answers["TRL"], answers["bradley"]) if "seconds" in t]
    if not rounds:
        return print("TRL ran out of memory in every round", flush=True)
    ratios = [t["seconds"] / b["seconds"] for t, b in rounds]
    for which, all_ in {
        "TRL " + best: [t for t, _ in rounds],
        "bradley": [b for _, b in rounds],
    }.items():
        rate = [a["pairs"] / a["seconds"] for a in all_]
        flops = [a["gflop"] / a["seconds"] / 1e3 for a in all_ if "gflop" in a]
        peak = max(a.get("peak_bytes", 0) for a in all_) / 1e9
        ratio = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            if which == "bradley"
            else ""
        )
        table.append(
            f"| {shape} | train LoRA | {which} "
            f"| {statistics.median(rate):.2f} ({min(rate):.2f}–{max(rate):.2f}) "
            f"| {statistics.median(flops) if flops else 0:.0f} | {peak:.1f} | {ratio} |"
        )


def load(service, rows, clients, seconds):
    """Measures clients that each score one pair after the other."""
    times, next_row, end = [], iter(range(10**9)), time.perf_counter() + seconds

    def client(_):
        while time.perf_counter() < end:
            i = next(next_row)
            row = rows[i % len(rows)]
            # Every pair is new: the reference cache must not answer.
            prompt = [
                dict(m, content=f"{clients}.{i} {m['content']}") if j == 0 else m
                for j, m in enumerate(row["prompt"])
            ]
            times.append(service.score([dict(row, prompt=prompt)])["seconds"])

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    took, times = time.perf_counter() - start, sorted(times)
    at = lambda q: times[min(len(times) - 1, int(q * len(times)))]
    return {
        "clients": clients,
        "seconds": took,
        "pairs": len(times),
        "p50": at(0.5),
        "p99": at(0.99),
    }


def gflop(folder, rows):
    """Returns the GFLOP of scoring these rows with policy and reference, counted as in offline.rs:
    each prompt once, and the head on completions only."""
    from transformers import AutoTokenizer

    tokenizer, c = (
        AutoTokenizer.from_pretrained(folder),
        json.loads((folder / "config.json").read_text()),
    )
    hidden, head = (
        c["hidden_size"],
        c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
    )
    width, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    linear = c["num_hidden_layers"] * (
        2 * hidden * (width + keys) + 3 * hidden * c["intermediate_size"]
    )

    def length(messages, generate):
        return len(
            tokenizer(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate
                ),
                add_special_tokens=False,
            )["input_ids"]
        )

    total = 0
    for row in rows:
        prompt = length(row["prompt"], True)
        sides = [
            min(length(row["prompt"] + row[side], False), args.max_length) - prompt
            for side in ("chosen", "rejected")
        ]
        seen = prompt * prompt / 2 + sum(n * (prompt + n / 2) for n in sides)
        total += 2 * (
            2 * linear * (prompt + sum(sides))
            + 2 * hidden * c["vocab_size"] * sum(sides)
            + 4 * width * c["num_hidden_layers"] * seen
        )
    return total / 1e9


def scoring(shape, folder, path, rows):
    from service import Service

    start = time.perf_counter()
    short = [r for r in rows if sum(len(m["content"]) for m in r["prompt"]) < 1.5 * args.max_length]
    service = Service(
        str(args.programs / "bradley"),
        folder,
        "bf16",
        short,
        args.max_length,
        device=args.device,
        log=None,
    )
    adapter = next(Path(service.folder).rglob("adapter_config.json")).parent
    note(what="service ready", shape=shape, seconds=time.perf_counter() - start)
    theirs = trl(folder, path, "score", str(adapter))
    service.score(rows[-8:])
    theirs.ask(json.dumps({"batch": 4, "first": len(rows) - 8, "pairs": 8}))
    tried = {}
    for batch in args.transformers:
        tried[batch] = note(
            what="score",
            shape=shape,
            side="transformers, tried",
            batch=batch,
            **theirs.ask(json.dumps({"batch": batch, "first": len(rows) - 32, "pairs": 32})),
        )
    ran = [batch for batch, a in tried.items() if "seconds" in a]
    if not ran:
        sys.exit("transformers runs with none of these batches")
    batch = min(ran, key=lambda b: tried[b]["seconds"])
    answers = {"transformers": [], "bradley": []}
    for r in range(args.rounds):
        first, n = r * 32, 32
        answer = theirs.ask(json.dumps({"batch": batch, "first": first, "pairs": n}))
        if "seconds" not in answer:
            print("transformers ran out of memory", flush=True)
            continue
        answers["transformers"].append(
            note(what="score", shape=shape, side="transformers", batch=batch, **answer)
        )
        answer = service.score(rows[first : first + n])
        answer["peak_bytes"] = sampler.take(service.child.pid) or 0
        answer["gflop"] = gflop(folder, rows[first : first + n])
        answers["bradley"].append(note(what="score", shape=shape, side="bradley", **answer))
    theirs.close()
    apart = [
        abs(a - b)
        for t, o in zip(answers["transformers"], answers["bradley"])
        for a, b in zip(t["margins"], o["margins"])
    ]
    note(
        what="margins",
        shape=shape,
        pairs=len(apart),
        largest_difference=max(apart),
        mean_difference=statistics.mean(apart),
    )
    ratios = [
        t["seconds"] / b["seconds"] for t, b in zip(answers["transformers"], answers["bradley"])
    ]
    for which, all_ in answers.items():
        rate = [a["pairs"] / a["seconds"] for a in all_]
        peak = max(a.get("peak_bytes", 0) for a in all_) / 1e9
        ratio = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            if which == "bradley"
            else ""
        )
        flops = (
            f"{statistics.median(a['gflop'] / a['seconds'] / 1e3 for a in all_):.0f}"
            if which == "bradley"
            else ""
        )
        table.append(
            f"| {shape} | score, 32 pairs a request | {which} "
            f"| {statistics.median(rate):.2f} ({min(rate):.2f}–{max(rate):.2f}) "
            f"| {flops} | {peak:.1f} | {ratio} |"
        )
    for clients in args.loads:
        a = note(what="load", shape=shape, **load(service, rows, clients, args.seconds))
        loads.append(
            f"| {shape} | {clients} | {a['pairs'] / a['seconds']:.2f} "
            f"| {a['p50'] * 1e3:.0f} | {a['p99'] * 1e3:.0f} | {a['pairs']} |"
        )
    service.stop()


sampler, table, loads = Sampler(), [], []
path, rows = usable_rows()
try:
    for shape in args.shape:
        folder = model(shape)
        if "train" in args.what:
            training(shape, folder, path)
        if "score" in args.what:
            scoring(shape, folder, path, rows)
finally:
    print(
        "\n| shape | what | side | pairs/s: median (min–max) | TFLOP/s | peak GB "
        "| ratio: median (min–max) |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(table))
    print(
        "\n| shape | clients, a pair at a time | pairs/s | p50 ms | p99 ms | requests "
        "|\n|---|---|---|---|---|---|"
    )
    print("\n".join(loads))
