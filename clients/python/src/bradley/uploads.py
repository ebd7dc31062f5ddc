"""The bytes of a dataset, from files, rows and tables.

Rows and tables become JSONL. They are converted while they are sent, so that memory stays small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from bradley.messages import is_missing, plain, to_json, without_nulls
from bradley.v1 import dataset_pb2

CHUNK = 1 << 20
"""Size of a chunk of an upload, in bytes."""


class HasBatches(Protocol):
    """A pyarrow Table or Dataset."""

    def to_batches(self) -> Iterable[Any]:
        """Returns its record batches."""


DataLike = os.PathLike[str] | BinaryIO | HasBatches | Iterable[Any]
"""Rows of a dataset: a file's path (also as a str), its bytes, an open binary file, an iterator of
bytes, an iterable of dicts, a pandas DataFrame, a pyarrow Table or a `datasets.Dataset`."""


def metadata(
    display_name: str, file_format: str, model: str, max_length: int | None
) -> dataset_pb2.UploadMetadata:
    """Builds the first message of an upload. `file_format` is jsonl, parquet or empty."""
    names = {
        name.removeprefix("DATASET_FORMAT_").lower(): number
        for name, number in dataset_pb2.DatasetFormat.items()
    }
    if file_format and file_format not in names:
        raise ValueError(f"format is {file_format!r}: it must be jsonl or parquet")
    return dataset_pb2.UploadMetadata(
        display_name=display_name,
        format=names[file_format or "unspecified"],
        model=model,
        max_length=max_length or 0,
    )


def reader(data: DataLike) -> tuple[Callable[[], Iterator[bytes]], bool]:
    """Returns a function that begins to read the bytes, and true if it can be called again.

    Raises `TypeError` for data of an unknown kind.
    """
    return _reader(data)


def _reader(data: Any) -> tuple[Callable[[], Iterator[bytes]], bool]:
    # Without the types of libraries that need not be installed.
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file")
        return (lambda: _file(path)), True
    if isinstance(data, (bytes, bytearray, memoryview)):
        view = memoryview(data).cast("B")
        return (lambda: (bytes(view[i : i + CHUNK]) for i in range(0, len(view), CHUNK))), True
    if hasattr(data, "to_batches"):  # pyarrow Table and Dataset
        return (lambda: _lines(_arrow_rows(data.to_batches()))), True
    if hasattr(data, "iloc"):  # pandas DataFrame
        return (lambda: _lines(_frame_rows(data))), True
    if hasattr(data, "features") and hasattr(data, "iter"):  # datasets.Dataset, IterableDataset
        return (lambda: _lines(_typed(row) for row in data)), hasattr(data, "__len__")
    if hasattr(data, "read"):
        return (lambda: iter(lambda: bytes(data.read(CHUNK)), b"")), False
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"{type(data).__name__} is no dataset: give a path, bytes, rows as dicts, a DataFrame, "
            "a pyarrow Table or a datasets.Dataset"
        )
    return (lambda: _rows_or_bytes(iter(data))), isinstance(data, (list, tuple))


def _file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _rows_or_bytes(items: Iterator[Any]) -> Iterator[bytes]:
    for first in items:
        if isinstance(first, (bytes, bytearray, memoryview)):
            for item in _chained(first, items):
                view = memoryview(item).cast("B")
                for i in range(0, len(view), CHUNK):
                    yield bytes(view[i : i + CHUNK])
        else:
            yield from _lines(_chained(first, items))


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    """Converts rows to JSONL, in chunks."""
    buffer = bytearray()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is {type(row).__name__}: give a dict")
        try:
            line = to_json(plain(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number}: {error}") from error
        buffer += line.encode() + b"\n"
        while len(buffer) >= CHUNK:
            yield bytes(buffer[:CHUNK])
            del buffer[:CHUNK]
    if buffer:
        yield bytes(buffer)


def _typed(row: Mapping[str, Any]) -> Any:
    return without_nulls(plain(row))


def _arrow_rows(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from (_typed(row) for row in batch.to_pylist())


def _frame_rows(frame: Any) -> Iterator[Any]:
    for start in range(0, len(frame), 1000):
        for row in frame.iloc[start : start + 1000].to_dict(orient="records"):
            # A missing value is NaN in columns of numbers and texts.
            yield _typed({key: None if is_missing(value) else value for key, value in row.items()})
