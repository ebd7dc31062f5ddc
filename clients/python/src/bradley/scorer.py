"""Scoring as a stage of a data pipeline."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import grpc

from bradley import calls, forked, messages, tables
from bradley.calls import PolicyLike, ScoringArguments
from bradley.client import Client
from bradley.connection import Pem
from bradley.errors import BradleyError, from_status
from bradley.retry import Deadline, RetryPolicy
from bradley.tables import Column
from bradley.v1 import scoring_pb2

_SIDES = (
    ("reward", "double", "float64"),
    ("policy_logprob", "double", "float64"),
    ("reference_logprob", "double", "float64"),
    ("tokens", "bigint", "int64"),
    ("truncated", "boolean", "bool_"),
)
PAIR_COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("probability", "double", "float64"),
        Column("calibrated_probability", "double", "float64"),
        Column("margin", "double", "float64"),
        *(
            Column(f"{side}_{name}", sql, arrow)
            for side in ("chosen", "rejected")
            for name, sql, arrow in _SIDES
        ),
        Column("pair", "bigint", "int64"),
        Column("policy_version", "string", "string"),
        Column("error", "string", "string"),
    )
}
"""Columns for pairs. `calibrated_probability` has values where a calibration for these options is
saved with the checkpoint. A row with lists of answers has the values of its pair with the lowest
margin, whose number, from 1, is in `pair`."""

ANSWER_COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("rewards", "double", "float64", is_list=True),
        Column("probabilities", "double", "float64", is_list=True),
        Column("ranking", "bigint", "int64", is_list=True),
        Column("best", "bigint", "int64"),
        Column("policy_logprobs", "double", "float64", is_list=True),
        Column("reference_logprobs", "double", "float64", is_list=True),
        Column("tokens", "bigint", "int64", is_list=True),
        Column("policy_version", "string", "string"),
        Column("error", "string", "string"),
    )
}
"""Columns for rows with N answers. The lists have the order of the answers, `ranking` has their
numbers by decreasing reward, and `best` is the first of these."""

_PAIR_OUTPUT = ("probability", "margin", "chosen_reward", "rejected_reward", "error")
_ANSWER_OUTPUT = ("rewards", "ranking", "best", "error")
# Errors of a call that may come from a single row of it.
_ROW_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)

# Connections that a forked process has from its parent.
_OF_PARENTS: list[object] = []


class Scorer:
    """Scores batches of rows: `scorer(batch)` returns the batch with further columns.

    A scorer is picklable and connects with its first batch, in the process where that comes. So it
    can be given to Ray Data (`map_batches(Scorer, fn_constructor_kwargs=…)`), to
    `Dataset.map(scorer, batched=True)`, to Spark (`mapInPandas(scorer.pandas, …)`,
    `mapInArrow(scorer.arrow, …)`) and to Daft (`scorer.daft(…)`). It may be called by several
    threads.

    A row that cannot be scored stays, with the reason in the column `error`. An error that concerns
    every row (an unknown policy, a bad token, a server that cannot be reached) is raised.
    """

    def __init__(
        self,
        target: str | None = None,
        policy: PolicyLike = "",
        *,
        prompt: str = "prompt",
        chosen: str = "chosen",
        rejected: str = "rejected",
        completions: str = "",
        logged: str = "",
        output: Sequence[str] | str = "",
        prefix: str = "",
        pairs_per_call: int = 64,
        concurrency: int = 4,
        timeout: float = 600.0,
        token: str | Callable[[], str] | None = None,
        ca: Pem | None = None,
        cert: Pem | None = None,
        key: Pem | None = None,
        retry: RetryPolicy | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> None:
        """Makes a scorer.

        `target`, `token`, `ca`, `cert`, `key` and `retry` are those of `Client`, and `reference`,
        `beta`, `max_length`, `normalization`, `tools` and `chat_template_kwargs` those of
        `Client.score_pairs`. A `token` is pickled with the scorer; one that is read from
        BRADLEY_TOKEN is not.

        `prompt`, `chosen` and `rejected` name the columns of the pair. `chosen` and `rejected` may
        hold lists of answers, as the server's file formats do: each chosen one then makes a pair
        with each rejected one, and the row gets the values of the pair with the lowest margin.
        `logged` is that of `Client.score_pairs`. In a row with lists of answers, each column of
        log-probs has a list with a number for each answer.

        With `completions`, the name of a column with lists of answers, N answers are scored
        instead. `output` chooses the columns that are added: names of `PAIR_COLUMNS` or
        `ANSWER_COLUMNS`, or "all"; `prefix` is put before their names. At most `concurrency` calls
        with `pairs_per_call` pairs each are open at a time. `timeout` is the time of a batch, in
        seconds.
        """
        if not policy:
            raise ValueError(
                "policy is missing: give models/ID or trainingJobs/ID/checkpoints/STEP"
            )
        if pairs_per_call < 1 or concurrency < 1:
            raise ValueError("pairs_per_call and concurrency must be at least 1")
        self._logged_columns = messages.logged_columns(logged)
        if logged and completions:
            raise ValueError("logged is for pairs only: leave out logged or completions")
        self._logged = logged
        # Serialised, because not every serialiser of a pipeline knows protobuf's messages.
        self._options = calls.options(policy, arguments).SerializeToString()
        self._policy = calls.policy_name(policy)
        self._prompt, self._chosen, self._rejected = prompt, chosen, rejected
        self._completions = completions
        self._columns = _chosen_columns(output, prefix, bool(completions))
        self._prefix = prefix
        self._pairs_per_call, self._concurrency = min(pairs_per_call, 1024), concurrency
        self._timeout = timeout
        self._client_settings: dict[str, Any] = {
            "target": target,
            "token": token,
            "ca": ca,
            "cert": cert,
            "key": key,
            "retry": retry,
        }
        self._live: _Live | forked.NewPython | None = None
        self._lock = threading.Lock()

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that are added."""
        return self._columns

    @property
    def ddl(self) -> str:
        """The columns that are added, as a part of a schema of Spark."""
        return ", ".join(column.ddl() for column in self._columns)

    def __repr__(self) -> str:
        target = self._client_settings["target"]
        return f"Scorer({target!r}, {self._policy!r})"

    # Batches --------------------------------------------------------------------------------------

    def __call__(self, batch: Any) -> Any:
        """Scores a batch: a dict of columns, a pandas DataFrame, or a pyarrow Table."""
        self._check_columns(tables.names_of(batch))
        rows = tables.rows_of(batch, self._inputs())
        return tables.with_columns(batch, self._columns, self._scored(rows))

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Scores rows and returns copies of them with further keys."""
        given = list(rows)
        return [{**row, **scores} for row, scores in zip(given, self._scored(given), strict=True)]

    def pandas(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Scores DataFrames, as Spark's `mapInPandas` passes them."""
        for frame in frames:
            yield self(frame)

    def arrow(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Scores record batches, as Spark's `mapInArrow` passes them."""
        for batch in batches:
            yield self(batch)

    def daft(self, *columns: Any) -> Any:
        """Returns an expression of Daft: a struct with the scores.

        `columns` are the expressions of prompt, chosen and rejected, and then those of the
        log-probs that `logged` names; of prompt and completions for N answers.
        """
        import daft

        names = [self._prompt, self._completions]
        if not self._completions:
            names = [self._prompt, self._chosen, self._rejected, *self._logged_columns]
        if len(columns) != len(names):
            raise ValueError(f"{len(columns)} expressions are given: give those of {names}")
        fields = {c.name: daft.DataType.from_arrow_type(c.arrow_type()) for c in self._columns}

        def score(*series: Any) -> Any:
            import pyarrow

            batch = dict(zip(names, (one.to_pylist() for one in series), strict=True))
            scored = self(batch)
            return pyarrow.StructArray.from_arrays(
                [pyarrow.array(scored[c.name], type=c.arrow_type()) for c in self._columns],
                fields=[pyarrow.field(c.name, c.arrow_type()) for c in self._columns],
            )

        make: Any = daft.func.batch(return_dtype=daft.DataType.struct(fields))
        return make(score)(*columns)

    # Connection -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the connection. A later batch opens another one."""
        with self._lock:
            live, self._live = self._live, None
        if live is not None and live.process == os.getpid():
            live.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_live"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._live, self._lock = None, threading.Lock()

    def _connected(self) -> _Live | forked.NewPython:
        with self._lock:
            live = self._live
            if live is not None and live.process != os.getpid():
                # gRPC's objects must not be freed in a forked process either.
                _OF_PARENTS.append(live)
                live = None
            if isinstance(live, forked.NewPython) and not live.is_running:
                live = None
            if live is None:
                if forked.is_forked():
                    live = self._new_python()
                else:
                    live = _Live(self._client_settings, self._concurrency)
                self._live = live
            return live

    def _new_python(self) -> forked.NewPython:
        """Starts a Python that scores for a forked process."""
        twin, token = copy.copy(self), forked.Token()
        if callable(self._client_settings["token"]):
            twin._client_settings = {**self._client_settings, "token": token}
        return forked.NewPython(twin._scored, token)

    # Scoring --------------------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        answers = [self._completions] if self._completions else [self._chosen, self._rejected]
        return [self._prompt, *answers, *self._logged_columns, *messages.FURTHER_COLUMNS]

    def _check_columns(self, names: Sequence[str]) -> None:
        needed = {"completions": self._completions, "prompt": self._prompt}
        if not self._completions:
            # Without a prompt, whole dialogues are pairs, too.
            needed = {"chosen": self._chosen, "rejected": self._rejected}
        for argument, name in needed.items():
            if name not in names:
                raise ValueError(
                    f"the batch has no column {name!r}, only {', '.join(names)}: name the column "
                    f"with {argument}=…"
                )
        if absent := [name for name in self._logged_columns if name not in names]:
            raise ValueError(
                f"the batch has no column {absent[0]!r}, which logged={self._logged!r} needs, only "
                f"{', '.join(names)}"
            )
        if taken := [c.name for c in self._columns if c.name in names]:
            raise ValueError(
                f"the batch already has the columns {', '.join(taken)}: give a prefix=… for the "
                "columns of the scores"
            )

    def _scored(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns the added values of each row."""
        if not rows:
            return []
        live, deadline = self._connected(), Deadline(self._timeout)
        if isinstance(live, forked.NewPython):
            token = self._client_settings["token"]
            inputs = [{name: row.get(name) for name in self._inputs()} for row in rows]
            scored: list[dict[str, Any]] = live.call(inputs, token() if callable(token) else "")
            return scored
        score = self._score_answers if self._completions else self._score_pairs
        found = score(live, rows, deadline)
        names = {c.name: c.name.removeprefix(self._prefix) for c in self._columns}
        return [{name: values.get(plain) for name, plain in names.items()} for values in found]

    def _score_pairs(
        self, live: _Live, rows: Sequence[Mapping[str, Any]], deadline: Deadline
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{} for _ in rows]
        pairs: list[scoring_pb2.Pair] = []
        # The numbers of the pairs of each row.
        of_row: dict[int, range] = {}
        for number, row in enumerate(rows):
            named = {
                **{name: row.get(name) for name in messages.FURTHER_COLUMNS},
                **{name: row.get(name) for name in self._logged_columns},
                "prompt": row.get(self._prompt),
                "chosen": row.get(self._chosen),
                "rejected": row.get(self._rejected),
            }
            try:
                first = len(pairs)
                pairs.extend(messages.pair_messages(named, first, self._logged))
                of_row[number] = range(first, len(pairs))
            except messages.RowError as error:
                found[number] = {"error": str(error)}
        options = self._message()

        def call(
            chunk: Sequence[scoring_pb2.Pair],
        ) -> list[tuple[int, dict[str, Any]]]:
            try:
                response = live.client.score_call(options, chunk, deadline)
            except BradleyError as error:
                # The whole call was refused. If the options are not the reason, it is a row.
                if not _may_be_a_row(error):
                    raise
                if len(chunk) == 1:
                    return [(int(chunk[0].id), {"error": str(error)})]
                half = len(chunk) // 2
                return [*call(chunk[:half]), *call(chunk[half:])]
            return [
                (int(result.id), _pair_values(result, response.policy_version))
                for result in response.results
            ]

        chunks = messages.chunks_of(pairs, self._pairs_per_call, calls.BYTES_PER_CALL)
        scored = dict(one for results in live.map(call, chunks) for one in results)
        for number, numbers in of_row.items():
            found[number] = _lowest([scored[i] for i in numbers])
        return found

    def _score_answers(
        self, live: _Live, rows: Sequence[Mapping[str, Any]], deadline: Deadline
    ) -> list[dict[str, Any]]:
        options = self._message()

        def call(row: Mapping[str, Any]) -> dict[str, Any]:
            try:
                named = {
                    **{name: row.get(name) for name in messages.FURTHER_COLUMNS},
                    "prompt": row.get(self._prompt),
                    "completions": row.get(self._completions),
                }
                request = messages.completions_request(options, named)
            except messages.RowError as error:
                return {"error": str(error)}
            try:
                return _answer_values(live.client.completions_call(request, deadline))
            except BradleyError as error:
                if not _may_be_a_row(error):
                    raise
                return {"error": str(error)}

        return list(live.map(call, rows))

    def _message(self) -> scoring_pb2.ScoringOptions:
        return scoring_pb2.ScoringOptions.FromString(self._options)


class _Live:
    """The connection and the threads of a scorer in one process."""

    def __init__(self, settings: Mapping[str, Any], concurrency: int) -> None:
        self.process = os.getpid()
        self.client = Client(**settings)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="bradley-scorer")

    def map(self, call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Calls a function for all items, a few at a time. The first error ends it."""
        futures = [self._pool.submit(call, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()


def _chosen_columns(output: Sequence[str] | str, prefix: str, answers: bool) -> tuple[Column, ...]:
    known = ANSWER_COLUMNS if answers else PAIR_COLUMNS
    if output == "all":
        names: Sequence[str] = list(known)
    elif not output:
        names = _ANSWER_OUTPUT if answers else _PAIR_OUTPUT
    else:
        names = [output] if isinstance(output, str) else output
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"output has {', '.join(unknown)}: it may have {', '.join(known)}")
    return tuple(known[name].renamed(prefix) for name in names)


def _may_be_a_row(error: BradleyError) -> bool:
    """Returns true if a single row may be the reason why a call was refused."""
    fields = [violation.field for violation in error.violations]
    return error.code in _ROW_CODES and not any(field.startswith("options") for field in fields)


def _lowest(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the values of a row: those of its pair with the lowest margin, or the first error."""
    if len(pairs) == 1:
        return pairs[0]
    for place, values in enumerate(pairs, 1):
        if "error" in values:
            return {"error": f"pair {place}: {values['error']}"}
    place, values = min(enumerate(pairs, 1), key=lambda one: float(one[1]["margin"]))
    return {**values, "pair": place}


def _pair_values(result: scoring_pb2.PairResult, policy_version: str) -> dict[str, Any]:
    if result.WhichOneof("result") != "score":
        return {"error": str(from_status(result.error))}
    score = result.score
    values: dict[str, Any] = {
        "probability": score.probability,
        "margin": score.margin,
        "policy_version": policy_version,
    }
    if score.HasField("calibrated_probability"):
        values["calibrated_probability"] = score.calibrated_probability
    for side, answer in (("chosen", score.a), ("rejected", score.b)):
        for name, _, _ in _SIDES:
            values[f"{side}_{name}"] = getattr(answer, name)
    return values


def _answer_values(response: scoring_pb2.ScoreCompletionsResponse) -> dict[str, Any]:
    results = list(response.results)
    errors = [
        f"completions[{i}]: {from_status(result.error)}"
        for i, result in enumerate(results)
        if result.HasField("error")
    ]

    def each(name: str) -> list[Any]:
        return [getattr(r.score, name) if r.HasField("score") else None for r in results]

    return {
        "rewards": each("reward"),
        "probabilities": [r.probability if r.HasField("score") else None for r in results],
        "ranking": list(response.ranking),
        "best": response.ranking[0] if response.ranking else None,
        "policy_logprobs": each("policy_logprob"),
        "reference_logprobs": each("reference_logprob"),
        "tokens": each("tokens"),
        "policy_version": response.policy_version,
        "error": "; ".join(errors) or None,
    }
