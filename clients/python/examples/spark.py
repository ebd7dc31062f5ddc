"""Scores the pairs of Parquet files with Spark.

Usage: spark-submit spark.py SERVER POLICY INPUT OUTPUT
"""

import sys

from pyspark.sql import SparkSession

from bradley import Scorer


def main(server: str, policy: str, source: str, out: str) -> None:
    spark = SparkSession.builder.appName("bradley").getOrCreate()
    pairs = spark.read.parquet(source)
    scorer = Scorer(server, policy)
    # The columns of the table, and those that the scorer adds.
    schema = ", ".join(f"`{f.name}` {f.dataType.simpleString()}" for f in pairs.schema.fields)
    pairs.mapInArrow(scorer.arrow, f"{schema}, {scorer.ddl}").write.parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
