"""Scores the pairs of Parquet files with `datasets`.

Usage: python hugging_face_datasets.py SERVER POLICY INPUT OUTPUT
"""

import sys

from datasets import load_dataset

from bradley import Scorer


def main(server: str, policy: str, source: str, out: str) -> None:
    pairs = load_dataset("parquet", data_files=f"{source}/*.parquet", split="train")
    scored = pairs.map(Scorer(server, policy), batched=True, batch_size=512)
    scored.to_parquet(f"{out}/scored.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
