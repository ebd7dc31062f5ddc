"""Compares the speed of Bradley's generation with transformers and llama.cpp, in alternating
rounds.

  cargo build --release --bins
  python benches/decoding.py MODEL.gguf [--rounds 5] [--threads 2] [--precisions f32 bf16]
      [--batches 1 16] [--prompt-tokens 400] [--new-tokens 128] [--without-transformers]
      [--llama-cpp DIR --gguf-16 MODEL-BF16.gguf [--gguf-32 MODEL-F32.gguf]]
  python benches/decoding.py MODEL.gguf --beside [--rounds 5] [--seconds 30] [--clients 4]

Every side continues prompts of random tokens greedily, always with the same number of new tokens,
on the same number of threads. Loading is left out. A batch of N is N requests at the same time for
Bradley (`bradley serve` on loopback), and one batch for the others. "N samples of a prompt" is one
request to Bradley. Bradley's figures are measured by its client, which runs on the same cores.

- The prompt's part ends with the first new token; in a batch, with the last first token.
- Decoding is the tokens after that. For a batch of Bradley only the time counts in which all of its
  texts grow: from the last first token to the first end.
- The share of the bandwidth is measured at batch 1: bytes of the weights and of the cached keys and
  values that a token reads, divided by the bandwidth of a plain sum over 512 MiB in the same round.
  The head and the embedding count as one matrix if they are one. Keys and values are counted in the
  precision of the weights.

The programs of llama.cpp choose no tokens, have keys and values in f16, and compute the logits of
only one prompt of a batch. `llama-batched-bench` runs every batch, `llama-bench` batch 1, whose
whole request is the sum of its two tests. The GGUF in 16 bits (bf16 or f16) is compared with bf16,
the one in 32 bits with f32. llama.cpp makes them of another GGUF:

  DIR/llama-quantize --allow-requantize MODEL.gguf MODEL-BF16.gguf BF16

With --beside, some clients generate while the server scores two requests of four pairs at a time,
and then while it trains. Windows with one load alternate with windows with both. A line of the
table says what share of its speed a load keeps beside another one.

The Python needs tests/goldens/requirements.txt, grpcio-tools and googleapis-common-protos. Every
measurement is one JSON line in --out; the tables on standard output are markdown.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "compare"))

from service import Service, pb

PORT = 50972
PAIRS_PER_REQUEST = 4

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("--bradley", default=str(ROOT / "target/release/bradley"))
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=2, help="compute threads of every side")
parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="at most 64 each")
parser.add_argument("--prompt-tokens", type=int, default=400)
parser.add_argument("--new-tokens", type=int, default=128)
parser.add_argument("--without-transformers", action="store_true")
parser.add_argument("--llama-cpp", metavar="DIR", help="folder of llama-batched-bench, llama-bench")
parser.add_argument("--gguf-16", metavar="FILE", help="the model for llama.cpp, in bf16 or f16")
parser.add_argument("--gguf-32", metavar="FILE", help="the model for llama.cpp, in f32")
parser.add_argument("--beside", action="store_true", help="generation beside scoring and training")
parser.add_argument("--seconds", type=float, default=30, help="length of a window of --beside")
parser.add_argument("--clients", type=int, default=4, help="generating clients of --beside")
parser.add_argument("--out", default="decoding.jsonl")
args = parser.parse_args()
out = open(args.out, "a")


def note(**figures):
    print(json.dumps(figures), file=out, flush=True)
    print(json.dumps(figures), file=sys.stderr, flush=True)


def spread(values, form):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


class Model:
    """Sizes of the model, read from the file."""

    def __init__(self, file):
        from gguf import GGUFReader

        reader = GGUFReader(file)
        architecture = reader.get_field("general.architecture").contents()

        def number(key, default=None):
            field = reader.get_field(f"{architecture}.{key}")
            return default if field is None else int(field.contents())

        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        # Of an embedding that is not also the head, a token reads one row.
        untied = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        self.weights_per_token = sum(sizes.values()) - untied
        hidden, heads = number("embedding_length"), number("attention.head_count")
        key_heads = number("attention.head_count_kv", heads)
        key = number("attention.key_length", hidden // heads)
        value = number("attention.value_length", hidden // heads)
        self.cached_per_token = number("block_count") * key_heads * (key + value)
        self.vocabulary = sizes["token_embd.weight"] // hidden

    def bytes_per_token(self, precision):
        """Returns the bytes that a token reads on average if it is decoded alone."""
        context = args.prompt_tokens + args.new_tokens / 2
        width = {"f32": 4, "bf16": 2}[precision]
        return width * (self.weights_per_token + context * self.cached_per_token)

    def prompts(self, count, seed):
        rng = random.Random(seed)
        return [
            [rng.randrange(self.vocabulary) for _ in range(args.prompt_tokens)]
            for _ in range(count)
        ]


class Side:
    """A process that runs a round for each line."""

    def __init__(self, *arguments):
        threads = str(args.threads)
        self.process = subprocess.Popen(
            [sys.executable, HERE / "compare/generation_side.py", *arguments, threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        ready = self.process.stdout.readline().strip()
        assert ready == "ready", f"generation_side.py {arguments} failed: run it by hand to see why"

    def run(self, **ask):
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def serve(precision):
    longest = -(-(args.prompt_tokens + args.new_tokens + 128) // 64) * 64
    most = max(args.clients, *args.batches)
    flags = ["--threads", str(args.threads), "--reference-cache-tokens", "0",
             "--generation-cache-tokens", str(max(32768, most * longest))]  # fmt: skip
    return Service(args.bradley, args.model, precision, ROWS, 512, PORT, flags=flags)


def ask_bradley(server, prompt, samples=1):
    """Starts a request, and returns its stream of responses."""
    request = pb["generation"].GenerateCompletionsRequest(
        policy="models/m",
        prompt_token_ids=prompt,
        samples=samples,
        max_tokens=args.new_tokens,
        temperature=0,
        ignore_eos=True,
    )
    return server.generation.GenerateCompletions(request)


def bradley(server, prompts, samples=1):
    """Sends a request for each prompt at the same time, and returns the figures of all together."""
    line = threading.Barrier(len(prompts) + 1)

    def arrivals(prompt):
        line.wait()
        arrived = []
        for response in ask_bradley(server, prompt, samples):
            now = time.perf_counter()
            arrived += [(d.index, now, len(d.token_ids)) for d in response.deltas if d.token_ids]
        return arrived

    with ThreadPoolExecutor(len(prompts)) as pool:
        calls = [pool.submit(arrivals, prompt) for prompt in prompts]
        line.wait()
        start = time.perf_counter()
        arrived = [call.result() for call in calls]
    # The arrivals of each text: (time, number of tokens).
    texts = [
        [(now, count) for index, now, count in of_request if index == sample]
        for of_request in arrived
        for sample in range(samples)
    ]
    assert all(sum(count for _, count in text) == args.new_tokens for text in texts), "short texts"
    all_begun, end = max(text[0][0] for text in texts), max(text[-1][0] for text in texts)
    first_end = min(text[-1][0] for text in texts)
    assert first_end > all_begun, "a text ended before all had begun: use more --new-tokens"
    grown = sum(count for text in texts for now, count in text if all_begun < now <= first_end)
    return {
        "prompt_seconds": all_begun - start,
        "decoding": grown / (first_end - all_begun),
        "seconds": end - start,
    }


def llama_cpp(program, *arguments):
    """Runs a program of llama.cpp and returns its JSON lines."""
    folder = Path(args.llama_cpp)
    places = [folder / program, folder / "bin" / program, folder / "build/bin" / program]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        sys.exit(f"--llama-cpp: {folder} has no {program}")
    libraries = f"{found.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    done = subprocess.run(
        [found, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{program} failed:\n{done.stderr[-3000:]}")
    return lines


def batched_bench(gguf, batch):
    room = -(-(args.prompt_tokens + args.new_tokens) // 256) * 256
    [figures] = llama_cpp("llama-batched-bench", "-m", gguf, "-c", batch * room, "-b", 2048,
                          "-ub", 512, "-npp", args.prompt_tokens, "-ntg", args.new_tokens,
                          "-npl", batch, "-t", args.threads, "-tb", args.threads,
                          "--output-format", "jsonl")  # fmt: skip
    return {
        "prompt_seconds": figures["t_pp"],
        "decoding": figures["speed_tg"],
        "seconds": figures["t_pp"] + figures["t_tg"],
    }


def llama_bench(gguf):
    def rate(*what):
        [figures] = llama_cpp("llama-bench", "-m", gguf, *what, "-t", args.threads,
                              "-r", 1, "-o", "jsonl")  # fmt: skip
        return figures["avg_ts"]

    prompt_seconds = args.prompt_tokens / rate("-p", args.prompt_tokens, "-n", 0)
    decoding = rate("-p", 0, "-n", args.new_tokens, "-d", args.prompt_tokens)
    return {
        "prompt_seconds": prompt_seconds,
        "decoding": decoding,
        "seconds": prompt_seconds + args.new_tokens / decoding,
    }


def sides_of(batch, server, transformers, gguf):
    """Returns a function for each side, which runs the prompts and returns the figures."""
    sides = {"bradley": lambda prompts: bradley(server, prompts)}
    if batch > 1:
        sides[f"bradley, {batch} samples of a prompt"] = lambda prompts: bradley(
            server, prompts[:1], batch
        )
    if transformers:
        sides["transformers"] = lambda prompts: transformers.run(
            prompts=prompts, new_tokens=args.new_tokens
        )
    if gguf:
        sides["llama-batched-bench"] = lambda _: batched_bench(gguf, batch)
        if batch == 1:
            sides["llama-bench"] = lambda _: llama_bench(gguf)
    return sides


def compare(model, precision):
    """Runs the rounds of a precision, and prints its lines of the table."""
    gguf = args.gguf_16 if precision == "bf16" else args.gguf_32
    with ExitStack() as stack:
        server = serve(precision)
        stack.callback(server.stop)
        memory = Side("bandwidth")
        stack.callback(memory.stop)
        transformers = None
        if not args.without_transformers:
            transformers = Side(args.model, precision)
            stack.callback(transformers.stop)
        sides = {
            batch: sides_of(batch, server, transformers, gguf if args.llama_cpp else None)
            for batch in args.batches
        }
        results, bandwidths = {}, []
        for r in range(args.rounds + 1):
            bandwidth = memory.run()["bytes_per_second"]
            # The first round touches memory for the first time.
            if r > 0:
                bandwidths.append(bandwidth)
            for batch in args.batches:
                prompts = model.prompts(batch, f"{r} {batch}")
                order = list(sides[batch])
                for side in order if r % 2 == 0 else reversed(order):
                    figures = sides[batch][side](prompts)
                    note(precision=precision, batch=batch, side=side, round=r, **figures)
                    if r > 0:
                        results.setdefault((batch, side), []).append(figures)
    need = model.bytes_per_token(precision)
    for batch in args.batches:
        for side in sides[batch]:
            print_side(precision, batch, side, results, bandwidths, need)
    read = [bandwidth / 1e9 for bandwidth in bandwidths]
    note(precision=precision, bytes_per_token=need, read_gb_per_second=read)
    print(
        f"\n{precision}: reading memory: {spread(read, '.1f')} GB/s; "
        f"a token of batch 1 reads {need / 1e6:.0f} MB\n"
    )


def print_side(precision, batch, side, results, bandwidths, need):
    own, figures = results[batch, "bradley"], results[batch, side]
    prompt_tokens = args.prompt_tokens * (1 if "samples" in side else batch)
    new_tokens = args.new_tokens * batch
    decoding = [a["decoding"] / b["decoding"] for a, b in zip(own, figures)]
    whole = [b["seconds"] / a["seconds"] for a, b in zip(own, figures)]
    share = "—"
    if batch == 1:
        shares = [100 * f["decoding"] * need / read for f, read in zip(figures, bandwidths)]
        share = f"{spread(shares, '.0f')} %"
    print(
        f"| {precision} | {batch} | {side} "
        f"| {spread([prompt_tokens / f['prompt_seconds'] for f in figures], '.0f')} "
        f"| {spread([f['decoding'] for f in figures], '.1f')} "
        f"| {spread([new_tokens / f['seconds'] for f in figures], '.1f')} "
        f"| {spread(decoding, '.2f')} | {spread(whole, '.2f')} | {share} |"
    )


class Load:
    """Threads that repeat `work`, a generator of numbers of things that are done, until the load
    is closed."""

    def __init__(self, clients, work):
        self.done, self.failures, self.closing = [], [], threading.Event()
        self.threads = [
            threading.Thread(target=self.repeat, args=(work, client)) for client in range(clients)
        ]

    def repeat(self, work, client):
        try:
            for i in itertools.count():
                with closing(work(client, i)) as counts:
                    for count in counts:
                        self.done.append((time.perf_counter(), count))
                        if self.closing.is_set():
                            return
        except Exception as e:
            self.failures.append(e)

    def rate(self, start, end):
        """Returns the things per second between the first and the last that ended in the window."""
        if self.failures:
            raise self.failures[0]
        ended = [(now, count) for now, count in list(self.done) if start <= now <= end]
        if len(ended) < 2:
            return 0.0
        return sum(count for _, count in ended[1:]) / (ended[-1][0] - ended[0][0])

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        for thread in self.threads:
            thread.join()


def window(*loads, during=None):
    """Runs the loads together, and returns the rate of each. `during` waits while they are
    measured; by default for --seconds. Its result is returned, too."""
    with ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        time.sleep(3)  # until all of them have work in progress
        start = time.perf_counter()
        result = (during or (lambda: time.sleep(args.seconds)))()
        end = time.perf_counter()
        return [load.rate(start, end) for load in loads], result


def beside(model, precision):
    """Measures generation, scoring and training alone and together, and prints the shares of their
    speed that are left."""
    t = pb["training"]
    server = serve(precision)

    def generating():
        def work(client, i):
            [prompt] = model.prompts(1, f"{client} {i}")
            call = ask_bradley(server, prompt)
            try:
                for response in call:
                    count = sum(len(delta.token_ids) for delta in response.deltas)
                    if count > 0:
                        yield count
            finally:
                call.cancel()

        return Load(args.clients, work)

    def scoring():
        def work(client, i):
            first = (2 * i + client) * PAIRS_PER_REQUEST % (len(ROWS) - PAIRS_PER_REQUEST + 1)
            yield server.score(ROWS[first : first + PAIRS_PER_REQUEST])["pairs"]

        return Load(2, work)

    def after(job, step):
        """Waits for a step after `step`, and returns its time, the job's tokens and the step."""
        while True:
            got = server.training.GetTrainingJob(t.GetTrainingJobRequest(name=job))
            assert got.state not in (t.JOB_STATE_FAILED, t.JOB_STATE_SUCCEEDED), got
            if got.progress.step > step:
                return time.perf_counter(), got.progress.tokens, got.progress.step
            time.sleep(0.03)

    def training(job):
        """Returns the tokens per second between two steps that are at least --seconds apart."""
        start, tokens, step = after(job, after(job, 0)[2])
        until = start + args.seconds
        while True:
            end, trained, step = after(job, step)
            if end >= until:
                return (trained - tokens) / (end - start)

    rates = {}

    def add(r, **measured):
        note(precision=precision, round=r, beside=True, **measured)
        for name, rate in measured.items():
            rates.setdefault(name, []).append(rate)

    def run(r, windows):
        for measure in windows if r % 2 == 0 else reversed(windows):
            measure(r)

    def scoring_alone(r):
        [rate], _ = window(scoring())
        add(r, scoring=rate)

    def generation_alone(r):
        [rate], _ = window(generating())
        add(r, generation=rate)

    def scoring_with_generation(r):
        [pairs, tokens], _ = window(scoring(), generating())
        add(r, scoring_with_generation=pairs, generation_with_scoring=tokens)

    try:
        for r in range(args.rounds):
            run(r, [scoring_alone, scoring_with_generation, generation_alone])
        job = server.submit(ROWS[:60], steps=100000)
        after(job, 3)

        def training_alone(r):
            add(r, training=training(job))

        def training_with_generation(r):
            [tokens], trained = window(generating(), during=lambda: training(job))
            add(r, training_with_generation=trained, generation_with_training=tokens)

        for r in range(args.rounds):
            run(r, [training_alone, training_with_generation])
        server.training.CancelTrainingJob(t.CancelTrainingJobRequest(name=job))
    finally:
        server.stop()
    units = {"scoring": "pairs/s", "training": "tokens/s", "generation": "tokens/s"}
    for what, other in (
        ("scoring", "generation"),
        ("training", "generation"),
        ("generation", "scoring"),
        ("generation", "training"),
    ):
        alone, together = rates[what], rates[f"{what}_with_{other}"]
        kept = [b / a for a, b in zip(alone, together)]
        print(
            f"| {precision} | {what}, {units[what]} | {spread(alone, '.2f')} "
            f"| {other} | {spread(together, '.2f')} | {spread(kept, '.2f')} |",
            flush=True,
        )


def made_up_rows():
    """Returns preference pairs of about 250 tokens in the prompt and 80 in each answer."""
    words = "time year people way day man thing woman life child world school state family".split()
    rng = random.Random(7)

    def message(role, count):
        return [{"role": role, "content": " ".join(rng.choice(words) for _ in range(count))}]

    return [
        {
            "prompt": message("user", 220),
            "chosen": message("assistant", 80),
            "rejected": message("assistant", 80),
        }
        for _ in range(64)
    ]


ROWS = made_up_rows()


def main():
    model = Model(args.model)
    if args.beside:
        print("| precision | what | alone | beside | together | share that is kept |")
        print("|---|---|---|---|---|---|", flush=True)
        for precision in args.precisions:
            beside(model, precision)
        return
    left_out = [
        f"llama.cpp is left out in {precision}: {flag} is not given"
        for precision, given, flag in (
            ("f32", args.gguf_32, "--gguf-32"),
            ("bf16", args.gguf_16, "--gguf-16"),
        )
        if precision in args.precisions and args.llama_cpp and not given
    ]
    if not args.llama_cpp:
        left_out = ["llama.cpp is left out: --llama-cpp is not given"]
    for line in left_out:
        print(line, flush=True)
    for precision in args.precisions:
        print(
            "\n| precision | batch | side | prompt, tokens/s | decoding, tokens/s "
            "| whole request, new tokens/s | Bradley's decoding as a multiple of it "
            "| whole request likewise | share of the bandwidth |"
            "\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        compare(model, precision)


main()
