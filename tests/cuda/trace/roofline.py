"""Prints how the time of a trace is divided:
roofline.py TRACE.tsv [--steps N] [--skip N] [--ordered K]

TRACE.tsv is the output of trace.cpp; it may be compressed (.gz, .xz). The tables are markdown.
"""

import argparse
import gzip
import lzma
import re
import statistics
import sys
from collections import Counter, defaultdict, namedtuple

BLAS = re.compile(r"^nvjet|^sm\d+_|cutlass|cublas|xmma|gemm|gemv|splitK", re.IGNORECASE)
GAPS = [(5e3, "<5 µs"), (20e3, "5–20 µs"), (100e3, "20–100 µs"), (float("inf"), ">100 µs")]


Record = namedtuple(
    "Record", "kind name start end stream grid block shared registers bytes copy ns"
)


def short(name):
    """Returns the name of an extern "C" kernel as it is, and others without their result's type and
    arguments, at most 60 characters of them."""
    if re.fullmatch(r"\w+", name) and not BLAS.search(name):
        return name
    name = re.sub(
        r"\([\w: ]+\)(?=-?\d)",
        "",
        name.removeprefix("void ").replace("(anonymous namespace)::", ""),
    )  # (type)1 is 1
    return name.split("(")[0][:60]


def read(path):
    """Returns the records, sorted by their start, and the remarks about them."""
    opener = gzip.open if path.endswith(".gz") else lzma.open if path.endswith(".xz") else open
    records, remarks, untimed, broken = [], [], 0, 0
    with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("#"):
                remarks.append(line[1:].strip())
                continue
            try:
                kind, name, *numbers, copy = line.rstrip("\n").split("\t")
                start, end, stream, gx, gy, gz, bx, by, bz, shared, registers, size = map(
                    int, numbers
                )
            except ValueError:
                broken += 1
                continue
            if start == 0 or end < start:
                untimed += 1
                continue
            grid, block = f"{gx}×{gy}×{gz}", f"{bx}×{by}×{bz}"
            records.append(
                Record(
                    kind,
                    short(name),
                    start,
                    end,
                    stream,
                    grid,
                    block,
                    shared,
                    registers,
                    size,
                    copy,
                    end - start,
                )
            )
    if untimed or broken:
        remarks.append(f"{untimed} records without times and {broken} broken lines are left out")
    return sorted(records, key=lambda r: (r.start, r.end)), remarks


def idle(records):
    """Returns for each record the idle time before it in ns (negative if it overlaps with earlier
    ones), and the end of the last record."""
    until, gaps = records[0].start, []
    for record in records:
        gaps.append(record.start - until)
        until = max(until, record.end)
    return gaps, until


def most(values):
    """Returns the most frequent value and the number of other values as text."""
    (first, _), *others = Counter(values).most_common()
    return f"{first} (+{len(others)})" if others else str(first)


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="the trace has N equal steps: print the figures per step, too",
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N kernels, and all else before the next kernel",
    )
    parser.add_argument(
        "--ordered",
        type=int,
        metavar="K",
        help="print instead the K records in the middle, in order",
    )
    args = parser.parse_args()

    records, remarks = read(args.trace)
    for remark in remarks:
        print(f"{remark}\n")
    if args.skip:
        records = records[
            (
                [i for i, r in enumerate(records) if r.kind == "kernel"][args.skip :]
                or [len(records)]
            )[0] :
        ]
    if not records:
        sys.exit("no records")
    gaps, last = idle(records)

    if args.ordered:
        first = max(0, (len(records) - args.ordered) // 2)
        head = [
            "#",
            "start µs",
            "gap µs",
            "µs",
            "stream",
            "what",
            "grid",
            "block",
            "shared",
            "registers",
        ]
        rows = []
        for i in range(first, min(len(records), first + args.ordered)):
            r = records[i]
            launch = (
                [r.grid, r.block, r.shared, r.registers]
                if r.kind == "kernel"
                else [f"{r.bytes} B", "", "", ""]
            )
            what = r.name if r.copy == "-" else f"{r.name} {r.copy}"
            start = (r.start - records[first].start) / 1e3
            rows.append(
                [
                    i,
                    f"{start:.1f}",
                    f"{gaps[i] / 1e3:.1f}",
                    f"{r.ns / 1e3:.1f}",
                    r.stream,
                    what,
                    *launch,
                ]
            )
        return table(head, rows)

    span = last - records[0].start
    free = sum(gap for gap in gaps if gap > 0)
    busy = max(span - free, 1)
    steps = args.steps or 1

    groups = defaultdict(list)
    for r in records:
        if r.kind == "kernel":
            groups[r.name, r.grid if BLAS.search(r.name) else ""].append(r)
    rows = []
    for (name, _), of in sorted(groups.items(), key=lambda group: -sum(r.ns for r in group[1])):
        times = [r.ns / 1e3 for r in of]
        total = sum(times) / 1e3
        row = [
            name,
            len(of),
            f"{total:.3f}",
            f"{total * 1e6 / busy:.1%}",
            f"{statistics.mean(times):.1f}",
            f"{statistics.median(times):.1f}",
        ]
        row += [most(r.grid for r in of), most(r.registers for r in of)]
        rows.append(row + [f"{len(of) / steps:g}", f"{total / steps:.3f}"] * bool(args.steps))
    head = [
        "kernel",
        "launches",
        "total ms",
        "of busy",
        "mean µs",
        "median µs",
        "grid",
        "registers",
    ]
    table(head + ["launches/step", "ms/step"] * bool(args.steps), rows)

    kernels = sum(r.ns for r in records if r.kind == "kernel")
    rows = [
        ("span", span),
        ("busy", busy),
        ("kernels, overlaps counted twice", kernels),
        ("idle", free),
    ]
    rows = [
        [name, f"{ns / 1e6:.3f}", f"{ns / max(span, 1):.1%}"]
        + [f"{ns / 1e6 / steps:.3f}"] * bool(args.steps)
        for name, ns in rows
    ]
    table(["total", "ms", "of span"] + ["ms/step"] * bool(args.steps), rows)

    rows, low = [], 0
    for high, name in GAPS:
        within = [gap for gap in gaps if max(low, 1) <= gap < high]
        rows.append(
            [name, len(within), f"{sum(within) / 1e6:.3f}", f"{sum(within) / max(span, 1):.1%}"]
        )
        low = high
    table(["gap", "count", "total ms", "of span"], rows)

    copies = defaultdict(list)
    for r in records:
        if r.kind != "kernel":
            copies["memset" if r.kind == "memset" else r.copy].append(r)
    rows = []
    for name, of in sorted(copies.items()):
        size, ns = sum(r.bytes for r in of), sum(r.ns for r in of)
        rows.append([name, len(of), size, f"{ns / 1e6:.3f}", f"{size / max(ns, 1):.2f}"])
    table(["copies", "count", "bytes", "total ms", "GB/s"], rows)


if __name__ == "__main__":
    main()
