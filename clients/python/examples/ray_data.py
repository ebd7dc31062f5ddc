"""Scores the pairs of Parquet files with Ray Data.

Usage: python ray_data.py SERVER POLICY INPUT OUTPUT

SERVER is dns:///HOST:PORT for several replicas, or http://HOST:PORT. INPUT and OUTPUT are folders,
or addresses such as s3://BUCKET/FOLDER.
"""

import sys

import ray.data

from bradley import Scorer


def main(server: str, policy: str, source: str, out: str) -> None:
    pairs = ray.data.read_parquet(source)
    scored = pairs.map_batches(
        Scorer,
        fn_constructor_args=(server, policy),
        batch_size=512,
        # Scorers only wait for the server: a fraction of a core is enough for each.
        concurrency=2,
        num_cpus=0.1,
    )
    scored.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
