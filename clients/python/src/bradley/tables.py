"""Batches of data libraries: how rows are read from them, and how columns are added to them.

A batch is a dict of columns (lists or numpy arrays), a pandas DataFrame, or a pyarrow Table or
RecordBatch. None of these libraries is imported before a batch of it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bradley.messages import is_missing, plain, without_nulls

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column that scoring adds."""

    name: str
    sql: str
    """Type in SQL, for Spark."""
    arrow: str
    """Name of the function of pyarrow that makes its type."""
    is_list: bool = False

    def ddl(self) -> str:
        """Returns the column in a schema of Spark."""
        return f"`{self.name}` {f'array<{self.sql}>' if self.is_list else self.sql}"

    def arrow_type(self) -> Any:
        """Returns the column's type in Arrow."""
        import pyarrow

        one = getattr(pyarrow, self.arrow)()
        return pyarrow.list_(one) if self.is_list else one

    def renamed(self, prefix: str) -> Column:
        """Returns the column with a prefix before its name."""
        return Column(prefix + self.name, self.sql, self.arrow, self.is_list)


def rows_of(batch: Any, columns: Sequence[str]) -> list[Row]:
    """Returns the rows of a batch, with those of `columns` that it has.

    Raises `TypeError` for a batch of an unknown kind.
    """
    present = [name for name in columns if name in names_of(batch)]
    values = {name: _values(batch, name) for name in present}
    return [
        {name: values[name][i] for name in present if not is_missing(values[name][i])}
        for i in range(_length(batch))
    ]


def names_of(batch: Any) -> list[str]:
    """Returns the names of a batch's columns."""
    if isinstance(batch, Mapping):
        return list(batch)
    if hasattr(batch, "column_names"):  # pyarrow Table
        return list(batch.column_names)
    if hasattr(batch, "schema"):  # pyarrow RecordBatch
        return list(batch.schema.names)
    if hasattr(batch, "columns"):  # pandas
        return [str(name) for name in batch.columns]
    raise TypeError(
        f"{type(batch).__name__} is no batch: give a dict of columns, a pandas DataFrame, or a "
        "pyarrow Table or RecordBatch"
    )


def _length(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return max((len(column) for column in batch.values()), default=0)
    return int(batch.num_rows) if hasattr(batch, "num_rows") else len(batch)


def _values(batch: Any, name: str) -> list[Any]:
    column = batch[name] if isinstance(batch, Mapping) or _is_frame(batch) else batch.column(name)
    values = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    return [_value(value) for value in values]


def _value(value: Any) -> Any:
    """Returns a cell. Typed columns fill the absent keys of messages with null."""
    if value is None or isinstance(value, (str, float, int)):
        return value
    try:
        return without_nulls(plain(value))
    except TypeError:
        # The row gets an error that names the type.
        return value


def _is_frame(batch: Any) -> bool:
    return hasattr(batch, "iloc")


def with_columns(batch: Any, columns: Sequence[Column], rows: Sequence[Row]) -> Any:
    """Returns a batch of the same kind with further columns.

    A value that is missing is None in lists, null in Arrow, and NaN in columns of numbers of numpy
    and pandas.
    """
    values = {column: [row.get(column.name) for row in rows] for column in columns}
    if _is_frame(batch):
        import pandas

        # The index of the batch, which need not begin with 0.
        added = {}
        for column in columns:
            array = _array(column, values[column])
            # With its own type, because pandas would make NaN of None in a column of texts.
            added[column.name] = pandas.Series(array, index=batch.index, dtype=array.dtype)
        return batch.assign(**added)
    if isinstance(batch, Mapping):
        arrays = any(type(column).__module__.startswith("numpy") for column in batch.values())
        converted = {c.name: _array(c, values[c]) if arrays else values[c] for c in columns}
        return {**batch, **converted}
    import pyarrow

    for column in columns:
        array = pyarrow.array(values[column], type=column.arrow_type())
        if hasattr(batch, "append_column"):
            batch = batch.append_column(column.name, array)
        else:
            batch = batch.add_column(batch.num_columns, column.name, array)
    return batch


def _array(column: Column, values: list[Any]) -> Any:
    import numpy

    if not column.is_list and column.arrow in ("float64", "int64", "bool_"):
        if column.arrow == "float64" or any(value is None for value in values):
            return numpy.array(
                [numpy.nan if value is None else float(value) for value in values], numpy.float64
            )
        return numpy.array(values, numpy.int64 if column.arrow == "int64" else numpy.bool_)
    array: Any = numpy.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array
