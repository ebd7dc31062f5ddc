"""Prints how near the GPU's limits each kernel runs: counters.py COUNTERS.csv

COUNTERS.csv is the output of
`ncu --section SpeedOfLight --metrics dram__bytes.sum --csv --page raw`.
The table (markdown) has for each kernel the launches, the time, the rate of the GPU's memory, and
the shares of the peak of the memory and of the multiprocessors that the hardware counted. The
larger share is the one that limits the kernel.
"""

import csv
import statistics
import sys
from collections import defaultdict

from roofline import BLAS, short

SCALES = {"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def scale(unit):
    """Returns the factor from a unit to seconds or bytes."""
    for name in ("second", "byte", "s"):
        if unit.endswith(name) or unit.endswith(name + "s"):
            return SCALES.get(unit.removesuffix("s").removesuffix(name.removesuffix("s"))[:1], 1)
    return 1


def main():
    lines = [line for line in open(sys.argv[1], encoding="utf-8") if line.startswith('"')]
    header, units, *rows = list(csv.reader(lines))
    columns = {"seconds": "gpu__time_duration.sum", "bytes": "dram__bytes.sum"}
    columns |= {
        "memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    }
    at = {key: header.index(name) for key, name in columns.items() if name in header}
    for key in columns.keys() - at.keys():
        print(f"no column {columns[key]}\n")
    name_at, groups = header.index("Kernel Name"), defaultdict(list)
    for row in rows:
        values = {
            key: float(row[i].replace(",", "") or 0)
            * (scale(units[i]) if key in ("seconds", "bytes") else 1)
            for key, i in at.items()
        }
        name = short(row[name_at])
        groups["products: " + name if BLAS.search(name) else name].append(values)
    print(
        "| kernel | launches | total µs | median µs | GB/s | memory, % of peak "
        "| multiprocessors, % of peak |\n|---|---|---|---|---|---|---|"
    )
    for name, of in sorted(groups.items(), key=lambda group: -sum(v["seconds"] for v in group[1])):
        seconds = sum(v["seconds"] for v in of)
        weighted = lambda key: sum(v.get(key, 0) * v["seconds"] for v in of) / seconds
        rate = sum(v.get("bytes", 0) for v in of) / seconds / 1e9
        median = statistics.median(v["seconds"] for v in of) * 1e6
        print(
            f"| {name} | {len(of)} | {seconds * 1e6:.0f} | {median:.1f} | {rate:.0f} "
            f"| {weighted('memory'):.0f} | {weighted('sm'):.0f} |"
        )


if __name__ == "__main__":
    main()
