"""Errors and retries against a gRPC server that fails as it is told.

A real server is rarely overloaded or lost at the moment that a test needs.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from bradley import (
    AsyncClient,
    BradleyError,
    Client,
    DeadlineExceededError,
    NotFoundError,
    ResourceExhaustedError,
    RetryPolicy,
    Scorer,
    UnavailableError,
)
from bradley.errors import from_status
from bradley.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

PAIRS = [{"id": str(i), "prompt": "x", "chosen": " y", "rejected": " z"} for i in range(4)]


def busy(delay: float | None, code: int = 14, reason: str = "QUEUE_FULL") -> status_pb2.Status:
    """Returns a status with this reason; by default that of a server that has no time now."""
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
    checkpoint_pb2_grpc.CheckpointServiceServicer,
    generation_pb2_grpc.GenerationServiceServicer,
):
    """Fails calls with the errors of a list, one after the other, and then answers."""

    def __init__(self) -> None:
        self.failures: list[Any] = []
        self.calls: list[tuple[str, float, Any]] = []
        self.bad_pairs: dict[str, status_pb2.Status] = {}
        # Number of further times that the server has no time for a pair.
        self.busy_again: dict[str, int] = {}
        # A pair because of which a whole call is refused, a file whose download lacks its end, or
        # a text before which a generation ends.
        self.spoiler = ""
        # Seconds before a failure.
        self.pause = 0.0
        # A pair or a text with which the connection of its stream is lost as soon as that may
        # happen, or a file in which a download is lost. `may_break` allows the loss of the
        # connection; `has_broken` is set when one of them is lost.
        self.breaker = ""
        self.may_break = threading.Event()
        self.may_break.set()
        self.has_broken = threading.Event()
        # Set by the second call.
        self.again = threading.Event()

    def _begin(self, name: str, request: Any, context: Any) -> None:
        if self.calls:
            self.again.set()
        self.calls.append((name, time.monotonic(), request))
        if self.failures:
            time.sleep(self.pause)
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
            self.busy_again[name] = self.busy_again.get(name, 0) - 1
            if self.busy_again[name] < 0:
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
            if self.breaker and part.pair.id == self.breaker and not self.has_broken.is_set():
                self.may_break.wait(4)
                self.has_broken.set()
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
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

    def StreamTrainingEvents(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("StreamTrainingEvents", request, context)
        event = training_pb2.TrainingEvent(sequence=1)
        event.state_change.to = training_pb2.JOB_STATE_SUCCEEDED
        yield event

    def UploadDataset(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self._begin("UploadDataset", None, context)
        size = sum(len(part.chunk) for part in request_iterator)
        return dataset_pb2.Dataset(name="datasets/x", size_bytes=size)

    def DownloadCheckpoint(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("DownloadCheckpoint", None, context)
        for name in ("a.json", "b.json"):
            file = checkpoint_pb2.ExportedFile(path=name, size_bytes=6)
            yield checkpoint_pb2.DownloadCheckpointResponse(file=file)
            yield checkpoint_pb2.DownloadCheckpointResponse(chunk=b"123")
            if name == self.breaker and not self.has_broken.is_set():
                self.has_broken.set()
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
            if name != self.spoiler:
                yield checkpoint_pb2.DownloadCheckpointResponse(chunk=b"456")

    def GenerateCompletions(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("GenerateCompletions", request, context)
        response = generation_pb2.GenerateCompletionsResponse(seed=request.seed)
        response.usage.completion_tokens = 2
        stop = generation_pb2.FINISH_REASON_STOP
        for text, finish_reason in (("a", None), ("b", stop)):
            if text == self.spoiler:
                return
            if text == self.breaker and not self.has_broken.is_set():
                self.may_break.wait(4)
                self.has_broken.set()
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
            part = generation_pb2.GenerateCompletionsResponse(seed=request.seed)
            part.deltas.add(text=text, token_ids=[7], finish_reason=finish_reason)
            yield part
        yield response


@pytest.fixture
def fake() -> Iterator[tuple[Fake, Client]]:
    # The generated classes are abstract only for type checkers.
    servicer = Fake()  # type: ignore[abstract]
    server = grpc.server(futures.ThreadPoolExecutor(4))
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(servicer, server)
    training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server)
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(servicer, server)
    checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(servicer, server)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
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
    address = client._session.address.target
    with Client(address, retry=RetryPolicy(max_attempts=1)) as once:
        servicer.failures = [busy(0.01)]
        with pytest.raises(UnavailableError):
            once.job("x")


def test_a_call_that_one_row_spoils_is_divided(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.spoiler = "2"
    with Scorer(client._session.address.target, "models/x") as scorer:
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


def test_a_stream_that_breaks_asks_for_every_row_once(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.breaker = "2"
    servicer.may_break.clear()
    answered = threading.Semaphore(0)

    def rows() -> Iterator[dict[str, str]]:
        for i, pair in enumerate(PAIRS):
            # The row after the one whose answer is lost waits for that answer.
            if i == 3:
                servicer.may_break.set()
            for _ in range(3 if i == 3 else 0):
                assert answered.acquire(timeout=4)
            yield pair

    ids = []
    for answer in client.stream_scores(rows(), "models/x", timeout=5):
        ids.append(answer.result.id)
        answered.release()
    assert sorted(ids) == ["0", "1", "2", "3"]
    assert servicer.has_broken.is_set()


def test_a_row_that_fails_while_a_stream_is_broken_is_an_error(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.breaker = "1"
    servicer.may_break.clear()

    def rows() -> Iterator[dict[str, str]]:
        yield from PAIRS[:2]
        servicer.may_break.set()
        # The row was asked for by the first stream, and fails when the second one has begun.
        assert servicer.again.wait(4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(client.stream_scores(rows(), "models/x", timeout=5))


def test_an_asynchronous_stream_that_breaks_asks_for_every_row_once(
    fake: tuple[Fake, Client],
) -> None:
    servicer, client = fake
    servicer.breaker = "2"
    servicer.may_break.clear()

    async def score() -> list[str]:
        answered = asyncio.Semaphore(0)
        ids = []

        async def rows() -> AsyncIterator[dict[str, str]]:
            for i, pair in enumerate(PAIRS):
                if i == 3:
                    servicer.may_break.set()
                for _ in range(3 if i == 3 else 0):
                    await answered.acquire()
                yield pair

        async with AsyncClient(client._session.address.target) as other:
            async for answer in other.stream_scores(rows(), "models/x", timeout=5):
                ids.append(answer.result.id)
                answered.release()
        return ids

    assert sorted(asyncio.run(asyncio.wait_for(score(), 20))) == ["0", "1", "2", "3"]
    assert servicer.has_broken.is_set()


def test_a_download_that_breaks_is_repeated(fake: tuple[Fake, Client], tmp_path: Path) -> None:
    servicer, client = fake
    servicer.breaker = "b.json"
    paths = client.download("trainingJobs/x", tmp_path)
    assert [path.read_bytes() for path in paths] == [b"123456"] * 2
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [name for name, _, _ in servicer.calls] == ["DownloadCheckpoint"] * 2


def test_a_file_that_is_not_complete_has_no_name(fake: tuple[Fake, Client], tmp_path: Path) -> None:
    servicer, client = fake
    servicer.spoiler = "b.json"
    with pytest.raises(BradleyError, match=r"b\.json has not the size that the server named"):
        client.download("trainingJobs/x", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_generation_that_breaks_is_repeated_with_its_seed(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.breaker = "b"
    completions = client.generate("x", "models/x")
    assert completions.text == "ab"
    assert completions.samples[0].token_ids == (7, 7)
    seeds = [(name, request.seed) for name, _, request in servicer.calls]
    assert seeds == [("GenerateCompletions", completions.seed)] * 2


def test_texts_that_were_returned_are_not_generated_again(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.failures = [busy(0.05)]
    servicer.breaker = "b"
    servicer.may_break.clear()
    deltas = client.stream_completions("x", "models/x")
    assert next(deltas).text == "a"
    servicer.may_break.set()
    with pytest.raises(UnavailableError, match="the connection was lost"):
        next(deltas)
    assert [name for name, _, _ in servicer.calls] == ["GenerateCompletions"] * 2

    async def stream() -> None:
        async with AsyncClient(client._session.address.target) as other:
            deltas = other.stream_completions("x", "models/x")
            assert (await anext(deltas)).text == "a"
            servicer.may_break.set()
            with pytest.raises(UnavailableError, match="the connection was lost"):
                await anext(deltas)

    servicer.has_broken.clear()
    servicer.may_break.clear()
    servicer.failures = [busy(0.05)]
    asyncio.run(asyncio.wait_for(stream(), 20))
    assert [name for name, _, _ in servicer.calls] == ["GenerateCompletions"] * 4


def test_a_text_without_its_end_is_an_error(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    servicer.spoiler = "b"
    with pytest.raises(BradleyError, match="the stream ended before all samples were complete"):
        client.generate("x", "models/x")
    deltas = client.stream_completions("x", "models/x")
    assert next(deltas).text == "a"
    with pytest.raises(BradleyError, match="the stream ended before all samples were complete"):
        next(deltas)


def test_the_server_may_ask_for_more_attempts_than_lost_connections_get(
    fake: tuple[Fake, Client],
) -> None:
    servicer, client = fake
    few = RetryPolicy(max_attempts=3, first_delay=0.01)
    with Client(client._session.address.target, retry=few, timeout=5) as other:
        servicer.failures = [busy(0.01)] * 8
        assert other.job("x").name == "trainingJobs/x"
        servicer.failures = [grpc.StatusCode.UNAVAILABLE] * 3
        with pytest.raises(UnavailableError):
            other.job("x")
        assert servicer.failures == []


def test_the_server_may_ask_for_more_attempts_at_a_pair(fake: tuple[Fake, Client]) -> None:
    servicer, client = fake
    few = RetryPolicy(max_attempts=2, first_delay=0.01)
    with Client(client._session.address.target, retry=few) as other:
        servicer.bad_pairs, servicer.busy_again = {"1": busy(0.01)}, {"1": 3}
        answers = list(other.stream_scores(iter(PAIRS), "models/x", timeout=5))
        assert sorted(a.result.id for a in answers) == ["0", "1", "2", "3"]
        assert all(a.result.HasField("score") for a in answers)
        assert len(servicer.calls) == 5
    once = RetryPolicy(max_attempts=1)
    with Client(client._session.address.target, retry=once) as other:
        servicer.bad_pairs = {"1": busy(0.01)}
        answers = list(other.stream_scores(iter(PAIRS), "models/x", timeout=5))
        assert [a.result.id for a in answers if a.result.HasField("error")] == ["1"]


def test_a_stream_that_ends_at_once_is_not_opened_again_at_once(
    fake: tuple[Fake, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, client = fake
    monkeypatch.setattr("bradley.calls._PAUSE", 0.2)
    servicer.failures = [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
    assert [event.sequence for event in client.watch("x")] == [1]
    assert [name for name, _, _ in servicer.calls] == ["StreamTrainingEvents"] * 3
    assert min(gaps(servicer)) >= 0.2


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_the_call_may_last() -> None:
    # Takes connections and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with Client(f"http://127.0.0.1:{port}", connect_timeout=60) as client:
            start = time.monotonic()
            with pytest.raises(BradleyError):
                client.cancel("x", timeout=0.3)
            assert time.monotonic() - start < 30


def test_a_first_call_whose_connection_is_lost_late_is_repeated(
    fake: tuple[Fake, Client],
) -> None:
    servicer, client = fake
    with Client(client._session.address.target, connect_timeout=0.3) as other:
        servicer.pause = 0.5
        servicer.failures = [grpc.StatusCode.UNAVAILABLE]
        assert other.job("x").name == "trainingJobs/x"
    assert len(servicer.calls) == 2


def test_a_server_that_notices_the_deadline_first_counts_as_reached(
    fake: tuple[Fake, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, client = fake
    with Client(client._session.address.target, timeout=5) as other:
        # As if the connection were made only during the call.
        monkeypatch.setattr(other, "_connect", lambda attempts: None)
        servicer.failures = [busy(None, code=4, reason="DEADLINE_EXCEEDED")]
        with pytest.raises(DeadlineExceededError, match="give a longer timeout") as late:
            other.job("x")
    assert "cannot reach" not in str(late.value)


def test_an_update_without_fields_changes_nothing(fake: tuple[Fake, Client]) -> None:
    _, client = fake
    with pytest.raises(ValueError, match="give some of"):
        client.update("x")
