"""Errors and retries against a gRPC server that fails as it is told.

A real server is rarely overloaded or lost at the moment that a test needs.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from bradley import (
    Client,
    NotFoundError,
    ResourceExhaustedError,
    RetryPolicy,
    Scorer,
    UnavailableError,
)
from bradley.errors import from_status
from bradley.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

PAIRS = [{"id": str(i), "prompt": "x", "chosen": " y", "rejected": " z"} for i in range(4)]


def busy(delay: float | None, code: int = 14, reason: str = "QUEUE_FULL") -> status_pb2.Status:
    """Returns the status of a server that has no time now."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="bradley.dev")]
    if delay is not None:
        retry: Any = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(delay * 1e9))
        details.append(retry)
    packed = []
    for detail in details:
        any_ = any_pb2.Any()
        any_.Pack(detail)
        packed.append(any_)
    return status_pb2.Status(code=code, message="no room now", details=packed)


class Fake(
    scoring_pb2_grpc.ScoringServiceServicer,
    training_pb2_grpc.TrainingServiceServicer,
    dataset_pb2_grpc.DatasetServiceServicer,
):
    """Fails calls with the errors of a list, one after the other, and then answers."""

    def __init__(self) -> None:
        self.failures: list[Any] = []
        self.calls: list[tuple[str, float, Any]] = []
        self.bad_pairs: dict[str, status_pb2.Status] = {}
        # A pair because of which a whole call is refused.
        self.spoiler = ""

    def _begin(self, name: str, request: Any, context: Any) -> None:
        self.calls.append((name, time.monotonic(), request))
        if self.failures:
            self._fail(self.failures.pop(0), context)

    def _fail(self, failure: Any, context: Any) -> None:
        if isinstance(failure, grpc.StatusCode):
            context.abort(failure, "the connection was lost")
        codes = {code.value[0]: code for code in grpc.StatusCode}
        context.set_trailing_metadata(
            [("grpc-status-details-bin", failure.SerializeToString()), ("x-request-id", "7")]
        )
        context.abort(codes[failure.code], failure.message)

    def _bad_pair(self, name: str) -> status_pb2.Status:
        """Returns the error of a pair. A server that had no time has time for it later; a pair that
        it refuses stays refused."""
        error = self.bad_pairs[name]
        if error.code == grpc.StatusCode.UNAVAILABLE.value[0]:
            del self.bad_pairs[name]
        return error

    def ScorePairs(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("ScorePairs", request, context)
        if self.spoiler in [pair.id for pair in request.pairs]:
            self._fail(busy(None, code=3, reason="MALFORMED_MESSAGE"), context)
        response = scoring_pb2.ScorePairsResponse(policy_version=request.options.policy)
        for pair in request.pairs:
            result = response.results.add(id=pair.id)
            if pair.id in self.bad_pairs:
                result.error.CopyFrom(self._bad_pair(pair.id))
            else:
                result.score.probability = 0.25
        return response

    def StreamScorePairs(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self._begin("StreamScorePairs", None, context)
        for part in request_iterator:
            if part.WhichOneof("part") == "options":
                continue
            answer = scoring_pb2.StreamScorePairsResponse()
            answer.result.id = part.pair.id
            if part.pair.id in self.bad_pairs:
                answer.result.error.CopyFrom(self._bad_pair(part.pair.id))
            else:
                answer.result.score.probability = 0.25
            yield answer

    def GetTrainingJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("GetTrainingJob", request, context)
        return training_pb2.TrainingJob(name=request.name)

    def CancelTrainingJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("CancelTrainingJob", request, context)
        return training_pb2.TrainingJob(name=request.name)

    def UploadDataset(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self._begin("UploadDataset", None, context)
        size = sum(len(part.chunk) for part in request_iterator)
        return dataset_pb2.Dataset(name="datasets/x", size_bytes=size)


@pytest.fixture
def fake() -> Iterator[tuple[Fake, Client]]:
    # The generated classes are abstract only for type checkers.
    servicer = Fake()  # type: ignore[abstract]
    server = grpc.server(futures.ThreadPoolExecutor(4))
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(servicer, server)
    training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server)
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"http://127.0.0.1:{port}", timeout=5, scoring_timeout=5) as client:
        client.job("x")
        servicer.calls.clear()
        yield servicer, client
    server.stop(None)


def gaps(fake: Fake) -> list[float]:
    """Returns the seconds between the calls."""
    times = [at for _, at, _ in fake.calls]
    return [b - a for a, b in itertools.pairwise(times)]


def test_a_call_is_repeated_after_the_delay_of_the_server(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.failures = [busy(0.3), busy(0.1)]
    assert client.job("x").name == "trainingJobs/x"
    first, second = gaps(servicer)
    assert first >= 0.3
    assert second >= 0.1


def test_an_error_without_a_delay_is_raised_at_once(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.failures = [busy(None, code=8, reason="TOO_MANY_JOBS")]
    with pytest.raises(ResourceExhaustedError, match="TOO_MANY_JOBS") as refused:
        client.job("x")
    assert len(servicer.calls) == 1
    error = refused.value
    assert (error.reason, error.request_id, error.retry_delay) == ("TOO_MANY_JOBS", "7", None)


def test_a_delay_beyond_the_timeout_is_not_waited_for(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.failures = [busy(60.0)]
    start = time.monotonic()
    with pytest.raises(UnavailableError) as refused:
        client.job("x")
    assert time.monotonic() - start < 5
    assert refused.value.retry_delay == 60.0
    assert refused.value.reason == "QUEUE_FULL"
    # An exception goes through the processes of a pipeline.
    copy = pickle.loads(pickle.dumps(refused.value))
    assert isinstance(copy, UnavailableError)
    assert (str(copy), copy.info) == (str(refused.value), refused.value.info)


def test_a_lost_connection_repeats_only_what_may_be_repeated(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.failures = [grpc.StatusCode.UNAVAILABLE]
    client.job("x")
    assert [name for name, _, _ in servicer.calls] == ["GetTrainingJob"] * 2
    servicer.calls.clear()
    servicer.failures = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(UnavailableError):
        client.cancel("x")
    servicer.failures = [busy(0.05)]
    client.cancel("x")
    assert [name for name, _, _ in servicer.calls] == ["CancelTrainingJob"] * 3


def test_an_upload_is_repeated_if_its_data_can_be(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    rows = [{"prompt": "x", "chosen": "y", "rejected": "z"}] * 1000
    servicer.failures = [busy(0.05)]
    size = client.upload(rows).size_bytes
    assert size == len(b'{"prompt": "x", "chosen": "y", "rejected": "z"}\n') * 1000
    servicer.failures = [busy(0.05)]
    with pytest.raises(UnavailableError):
        client.upload(iter(rows))


def test_only_the_pairs_that_failed_are_sent_again(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.bad_pairs = {"1": busy(0.1), "3": busy(None, code=3, reason="INVALID_ARGUMENT")}
    response = client.score_pairs(PAIRS, "models/x")
    assert [result.id for result in response.results] == ["0", "1", "2", "3"]
    assert [result.HasField("score") for result in response.results] == [True, True, True, False]
    assert [[p.id for p in request.pairs] for _, _, request in servicer.calls] == [
        ["0", "1", "2", "3"],
        ["1"],
    ]
    assert from_status(response.results[3].error).reason == "INVALID_ARGUMENT"


def test_pairs_of_a_stream_that_failed_are_sent_again(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.bad_pairs = {"1": busy(0.1), "3": busy(None, code=3, reason="INVALID_ARGUMENT")}
    pairs = [{**pair, "id": f"pair-{i}"} for i, pair in enumerate(PAIRS)]
    answers = {a.result.id: a.result for a in client.stream_scores(iter(pairs), "models/x")}
    assert sorted(answers) == ["pair-0", "pair-1", "pair-2", "pair-3"]
    assert not answers["pair-3"].HasField("score")
    assert answers["pair-1"].HasField("score")
    assert [name for name, _, _ in servicer.calls] == ["StreamScorePairs"] * 2
    assert gaps(servicer)[0] >= 0.1


def test_retries_can_be_turned_off(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    address = client._address.target
    with Client(address, retry=RetryPolicy(max_attempts=1)) as once:
        servicer.failures = [busy(0.01)]
        with pytest.raises(UnavailableError):
            once.job("x")


def test_a_call_that_one_row_spoils_is_divided(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.spoiler = "2"
    with Scorer(client._address.target, "models/x") as scorer:
        scored = scorer.rows(PAIRS)
    assert [row["probability"] for row in scored] == [0.25, 0.25, None, 0.25]
    assert scored[2]["error"] == "INVALID_ARGUMENT (MALFORMED_MESSAGE): no room now"


def test_a_deadline_without_time_is_refused() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ValueError, match="above 0"):
        client.models(timeout=-1)


def test_details_that_cannot_be_read_are_left_out(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake

    class Garbage:
        """The status of a proxy that uses the header for something else."""

        code, message = 5, "gone"

        def SerializeToString(self) -> bytes:  # noqa: N802
            return b"\xff\xff\xff"

    servicer.failures = [Garbage()]
    with pytest.raises(NotFoundError, match="gone") as missing:
        client.job("x")
    assert (missing.value.reason, missing.value.request_id) == ("", "7")
