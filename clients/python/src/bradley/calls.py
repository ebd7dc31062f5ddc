"""The parts of a client that do not depend on how it waits: requests, results and cursors."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import grpc

from bradley import messages
from bradley.errors import BradleyError, from_status, protocol_error
from bradley.retry import Deadline, RetryPolicy
from bradley.session import Attempts, Session
from bradley.v1 import (
    checkpoint_pb2,
    dataset_pb2,
    evaluation_pb2,
    model_pb2,
    scoring_pb2,
    training_pb2,
    usage_pb2,
)

PAIRS_PER_CALL = 256
"""Number of pairs in a ScorePairs call."""
BYTES_PER_CALL = 3 << 20
"""Maximum size of the pairs of a call, in bytes, unless a single pair is larger."""
STREAM_SECONDS = 600.0
"""Time after which an event stream is opened again, so that no call is without a deadline."""
IN_FLIGHT = 512
"""Maximum number of pairs of a scoring stream that are sent and not answered."""
_PAUSE = 1.0
"""Pause after an event stream that ended without an event, before the next one, in seconds."""

FINAL_STATES = frozenset(
    {
        training_pb2.JOB_STATE_CANCELLED,
        training_pb2.JOB_STATE_SUCCEEDED,
        training_pb2.JOB_STATE_FAILED,
    }
)

EvaluationProgress = evaluation_pb2.EvaluationProgress
"""Progress of an evaluation: numbers of pairs with a score, without one, and of all."""
PolicyLike = str | model_pb2.Model | checkpoint_pb2.Checkpoint | training_pb2.TrainingJob
"""A policy: its name or its message. A model's name may lack `models/`, and a job means its latest
checkpoint."""
JobLike = str | training_pb2.TrainingJob
"""A job: its name, with or without `trainingJobs/`, or its message."""


class ScoringArguments(TypedDict, total=False):
    """Options of scoring calls, as in the message ScoringOptions."""

    reference: PolicyLike
    """The reference. Default: that of the policy's job."""
    beta: float
    """β of the reward. Default: the job's, or 0.1 for a base model."""
    max_length: int
    """Maximum number of tokens of prompt + answer. Default: the job's, or 1024."""
    normalization: str
    """sum, mean or as_trained (the default)."""
    per_token_logprobs: bool
    """Return the log-prob of every token, too."""
    tools: Any
    """Tools that the model may call, as a list or as JSON."""
    chat_template_kwargs: Any
    """Variables of the chat template, as a dict or as JSON."""


def policy_name(policy: PolicyLike) -> str:
    """Returns the full name of a policy."""
    if isinstance(policy, training_pb2.TrainingJob):
        return f"{policy.name}/checkpoints/latest"
    name = policy if isinstance(policy, str) else policy.name
    if name.startswith("trainingJobs/") and name.count("/") == 1:
        return f"{name}/checkpoints/latest"
    return name if "/" in name else f"models/{name}"


def options(policy: PolicyLike, arguments: ScoringArguments) -> scoring_pb2.ScoringOptions:
    """Builds the options of a scoring call."""
    given: dict[str, Any] = {**arguments}
    if given.get("reference"):
        given["reference"] = policy_name(given["reference"])
    return messages.scoring_options(policy_name(policy), **given)


def evaluation_request(
    policy: PolicyLike,
    dataset: str | dataset_pb2.Dataset,
    arguments: ScoringArguments,
    **fields: Any,
) -> evaluation_pb2.EvaluatePolicyRequest:
    """Builds the request for an evaluation. `fields` are further fields of the message."""
    return evaluation_pb2.EvaluatePolicyRequest(
        options=options(policy, arguments),
        dataset=messages.name_of(dataset, "datasets"),
        **fields,
    )


class Evaluation:
    """Takes the messages of an evaluation's stream."""

    def __init__(self, on_progress: Callable[[EvaluationProgress], object] | None) -> None:
        self._on_progress = on_progress
        self._report: evaluation_pb2.EvaluationReport | None = None

    def take(self, message: evaluation_pb2.EvaluatePolicyResponse) -> None:
        """Takes the next message."""
        if message.WhichOneof("part") == "report":
            self._report = message.report
        elif self._on_progress is not None:
            self._on_progress(message.progress)

    def report(self) -> evaluation_pb2.EvaluationReport:
        """Returns the report, which is the last message of a stream."""
        if self._report is None:
            raise protocol_error("the evaluation ended without a report")
        return self._report


def pairs(rows: Iterable[messages.PairLike], logged: str = "") -> list[scoring_pb2.Pair]:
    """Converts rows to pairs. Raises `ValueError` with the number of a row that has none."""
    messages.logged_columns(logged)
    converted = []
    for number, row in enumerate(rows):
        try:
            converted.append(messages.pair_message(row, logged=logged))
        except messages.RowError as error:
            raise ValueError(f"pairs[{number}]: {error}") from error
    return converted


def job_request(
    job: messages.JobLike | None,
    fields: Mapping[str, Any],
    request_id: str | None = None,
    validate_only: bool = False,
) -> training_pb2.CreateTrainingJobRequest:
    """Builds the request for a job. It has a request_id, so that it can be repeated."""
    given = _named(job) if isinstance(job, Mapping) else job
    message = messages.job_message(given, _named(fields))
    for field in ("policy", "reference"):
        if getattr(message, field):
            setattr(message, field, policy_name(getattr(message, field)))
    for field in ("dataset", "eval_dataset"):
        if getattr(message, field):
            setattr(message, field, messages.full_name("datasets", getattr(message, field)))
    return training_pb2.CreateTrainingJobRequest(
        training_job=message,
        request_id=uuid.uuid4().hex if request_id is None else request_id,
        validate_only=validate_only,
    )


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces messages of resources by their names."""
    named = {}
    for field, value in fields.items():
        if field in ("policy", "reference") and not isinstance(value, str):
            value = policy_name(value)
        elif isinstance(value, dataset_pb2.Dataset):
            value = value.name
        named[field] = value
    return named


def update_request(
    job: JobLike, fields: Mapping[str, Any]
) -> training_pb2.UpdateTrainingJobRequest:
    """Builds the request that changes some fields of a job."""
    changeable = {"display_name", "labels", "priority", "ttl"}
    if unknown := fields.keys() - changeable:
        raise ValueError(f"{', '.join(sorted(unknown))}: only {sorted(changeable)} can be changed")
    if not fields:
        # An empty mask would replace all four.
        raise ValueError(f"nothing is to be changed: give some of {sorted(changeable)}")
    request = training_pb2.UpdateTrainingJobRequest(
        training_job=messages.job_message({"name": messages.name_of(job, "trainingJobs")}, fields)
    )
    request.update_mask.paths.extend(sorted(fields))
    return request


def job_states(states: Sequence[str]) -> list[training_pb2.JobState.ValueType]:
    """Converts the names of states, with or without JOB_STATE_ and in any case."""
    try:
        return [
            training_pb2.JobState.Value("JOB_STATE_" + s.upper().removeprefix("JOB_STATE_"))
            for s in states
        ]
    except ValueError as error:
        known = [
            name.removeprefix("JOB_STATE_").lower() for name, _ in training_pb2.JobState.items()
        ]
        raise ValueError(f"{error}: the states are {', '.join(known[1:])}") from error


def checkpoint_name(checkpoint: Any) -> str:
    """Returns the full name of a checkpoint. A job means its latest one."""
    if isinstance(checkpoint, checkpoint_pb2.Checkpoint):
        return checkpoint.name
    name = messages.name_of(checkpoint, "trainingJobs")
    return name if "/checkpoints/" in name else f"{name}/checkpoints/latest"


def export_format(name: str) -> checkpoint_pb2.ExportFormat.ValueType:
    """Converts the name of an export format: adapter, merged or empty."""
    names = {"": 0, "adapter": 1, "merged": 2}
    if name not in names:
        raise ValueError(f"format is {name!r}: it must be adapter or merged")
    return checkpoint_pb2.ExportFormat.ValueType(names[name])


Day = datetime.date | str
"""A day, as a date or as YYYY-MM-DD."""


def usage_request(
    owner: str, start_date: Day | None, end_date: Day | None, by_day: bool
) -> usage_pb2.GetUsageRequest:
    """Builds the request for usage."""
    return usage_pb2.GetUsageRequest(
        owner=owner,
        start_date=str(start_date or ""),
        end_date=str(end_date or ""),
        by_day=by_day,
    )


class PairsRun:
    """Tracks the pairs of a call. Those whose own error asks for a retry are requested again."""

    def __init__(
        self,
        options: scoring_pb2.ScoringOptions,
        pairs: Sequence[scoring_pb2.Pair],
        retry: RetryPolicy,
    ) -> None:
        self._options, self._pairs, self._retry = options, pairs, retry
        self._waiting = list(range(len(pairs)))
        self._results: dict[int, scoring_pb2.PairResult] = {}
        self._failures = 0
        self._responses: list[scoring_pb2.ScorePairsResponse] = []

    def request(self) -> scoring_pb2.ScorePairsRequest:
        """Returns the request for the pairs that have no result."""
        waiting = [self._pairs[i] for i in self._waiting]
        return scoring_pb2.ScorePairsRequest(options=self._options, pairs=waiting)

    def take(self, response: scoring_pb2.ScorePairsResponse) -> float | None:
        """Takes the results. Returns the delay before the next request, or `None` at the end."""
        self._responses.append(response)
        self._results.update(zip(self._waiting, response.results, strict=True))
        self._failures += 1
        delays = {
            i: self._retry.delay(from_status(result.error), self._failures, repeatable=False)
            for i in self._waiting
            if (result := self._results[i]).HasField("error")
        }
        self._waiting = [i for i, delay in delays.items() if delay is not None]
        return max((d for d in delays.values() if d is not None), default=None)

    def response(self) -> scoring_pb2.ScorePairsResponse:
        """Returns all results, in the order of the pairs."""
        whole = join_responses(self._responses)
        del whole.results[:]
        whole.results.extend(self._results[i] for i in range(len(self._pairs)))
        return whole


def join_responses(
    responses: Sequence[scoring_pb2.ScorePairsResponse],
) -> scoring_pb2.ScorePairsResponse:
    """Joins the responses of several calls. Versions are those of the first one; a warning says if
    another call used other weights."""
    whole = scoring_pb2.ScorePairsResponse()
    if responses:
        whole.CopyFrom(responses[0])
    for response in responses[1:]:
        whole.results.extend(response.results)
        for warning in response.warnings:
            if warning not in whole.warnings:
                whole.warnings.append(warning)
        if response.policy_version != whole.policy_version:
            text = f"some pairs were scored by {response.policy_version}"
            if text not in whole.warnings:
                whole.warnings.append(text)
    return whole


class EventCursor:
    """Follows a job's events across streams: where to continue, and when to stop."""

    def __init__(
        self, job: JobLike, after: int, tail: int, session: Session, timeout: float | None
    ) -> None:
        self.job = messages.name_of(job, "trainingJobs")
        self._session, self._timeout = session, timeout
        self._deadline = None if timeout is None else Deadline(timeout)
        self.attempts = Attempts(session, self._deadline, repeatable=True)
        self._sequence, self._tail = after, tail
        self._is_idle = True
        self.has_ended = False

    def request(self) -> training_pb2.StreamTrainingEventsRequest:
        """Returns the request for the events after the last one."""
        self._is_idle = True
        return training_pb2.StreamTrainingEventsRequest(
            parent=self.job, after_sequence=self._sequence, tail=self._tail
        )

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of the next stream. Raises `TimeoutError` if there is no time."""
        left = STREAM_SECONDS if self._deadline is None else self._deadline.remaining()
        if left <= 0:
            raise TimeoutError(f"{self.job} has not ended within {self._timeout} seconds")
        return self._session.settings(min(STREAM_SECONDS, left))

    def take(self, event: training_pb2.TrainingEvent) -> None:
        """Moves the cursor to an event."""
        self.attempts.answered()
        self._sequence, self._tail = event.sequence, 0
        self._is_idle = False
        if event.WhichOneof("event") == "state_change":
            self.has_ended = event.state_change.to in FINAL_STATES

    def delay_after(self, job: training_pb2.TrainingJob) -> float:
        """Returns the seconds before the next stream, after one that ended without an error.

        `job` is the job as it is now. It may have ended before the cursor; then the stream has no
        event.
        """
        self.has_ended = self._is_idle and job.state in FINAL_STATES
        return _PAUSE if self._is_idle and not self.has_ended else 0.0

    def delay(self, rpc_error: grpc.RpcError) -> float:
        """Returns the seconds before the next stream. Raises an error that is final."""
        if self._session.explained(rpc_error).is_timeout:
            # The limit of the stream, not of the watching. A proxy may have answered at once.
            left = _PAUSE if self._deadline is None else self._deadline.remaining()
            return max(0.0, min(_PAUSE, left)) if self._is_idle else 0.0
        return self.attempts.delay(rpc_error)


class StreamedPairs:
    """The pairs of a scoring stream that are not answered, to send them again on a new stream."""

    def __init__(self, logged: str) -> None:
        messages.logged_columns(logged)
        self._logged = logged
        self._count = 0
        self._ids: dict[int, str] = {}
        self.pending: dict[int, scoring_pb2.Pair] = {}
        self.is_exhausted = False

    def take(self, row: messages.PairLike) -> scoring_pb2.Pair:
        """Takes the next row and returns its pair, with its number as its id."""
        number = self._count
        try:
            pair = messages.pair_message(row, logged=self._logged)
        except messages.RowError as error:
            raise ValueError(f"pairs[{number}]: {error}") from error
        self._count += 1
        self._ids[number] = pair.id or str(number)
        pair.id = str(number)
        self.pending[number] = pair
        return pair

    def must_repeat(
        self, response: scoring_pb2.StreamScorePairsResponse, retry: RetryPolicy
    ) -> BradleyError | None:
        """Returns the error of a pair that must be sent again: of a server that stops, for example.

        The time of the whole stream limits how often a pair is sent.
        """
        if not response.result.HasField("error"):
            return None
        error = from_status(response.result.error)
        return None if retry.delay(error, 1, repeatable=False) is None else error

    def answered(self, response: scoring_pb2.StreamScorePairsResponse) -> bool:
        """Takes an answer and gives it the caller's id.

        Returns false if the pair is no longer awaited.
        """
        result = response.result
        number = int(result.id) if result.id.isdigit() else -1
        if self.pending.pop(number, None) is None:
            return False
        result.id = self._ids.pop(number)
        return True
