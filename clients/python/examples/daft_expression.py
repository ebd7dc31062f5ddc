"""Scores the pairs of Parquet files with Daft.

Usage: python daft_expression.py SERVER POLICY INPUT OUTPUT

The files have the columns id, prompt, chosen and rejected.
"""

import sys

import daft
from daft import col

from bradley import Scorer


def main(server: str, policy: str, source: str, out: str) -> None:
    scorer = Scorer(server, policy)
    pairs = daft.read_parquet(source)
    scored = pairs.with_column("score", scorer.daft(col("prompt"), col("chosen"), col("rejected")))
    # A struct; its fields become columns.
    fields = [col("score").get(column.name).alias(column.name) for column in scorer.columns]
    scored.select(col("id"), *fields).write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
