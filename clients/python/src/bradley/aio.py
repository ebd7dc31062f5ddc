"""The asynchronous client, with the same methods as the synchronous one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from pathlib import Path
from typing import Any, TypeVar, Unpack

import grpc

from bradley import calls, messages, uploads
from bradley.calls import JobLike, PolicyLike, ScoringArguments
from bradley.client import FileWriter, unreachable
from bradley.connection import Address, Pem
from bradley.errors import BradleyError, from_rpc
from bradley.loggers import EventLogger, LogTo, open_logger
from bradley.retry import Deadline, RetryPolicy, given
from bradley.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)

_T = TypeVar("_T")


class AsyncClient:
    """A client of a Bradley server for asyncio. `Client` describes the arguments.

    A client belongs to the event loop in which it makes its first call.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | Callable[[], str] | None = None,
        ca: Pem | None = None,
        cert: Pem | None = None,
        key: Pem | None = None,
        timeout: float = 60.0,
        scoring_timeout: float = 600.0,
        connect_timeout: float = 10.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Makes a client; see `Client`."""
        self._address = Address(target, token, ca, cert, key)
        self._timeout, self._scoring_timeout = timeout, scoring_timeout
        self._connect_timeout = connect_timeout
        self._retry = retry or RetryPolicy()
        self._has_answered = False
        self._channel = self._address.aio_channel()
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._evaluations = evaluation_pb2_grpc.EvaluationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._scoring = scoring_pb2_grpc.ScoringServiceStub(self._channel)
        self._training = training_pb2_grpc.TrainingServiceStub(self._channel)
        self._usage = usage_pb2_grpc.UsageServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the connection. Calls in progress are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Models ---------------------------------------------------------------------------------------

    async def models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """Returns the base models of the server."""
        request = model_pb2.ListModelsRequest()
        return list((await self._call(self._models.ListModels, request, timeout)).models)

    async def model(self, name: str, *, timeout: float | None = None) -> model_pb2.Model:
        """Returns a base model."""
        request = model_pb2.GetModelRequest(name=messages.full_name("models", name))
        return await self._call(self._models.GetModel, request, timeout)

    # Datasets -------------------------------------------------------------------------------------

    async def upload(
        self,
        data: uploads.DataLike,
        *,
        display_name: str = "",
        format: str = "",
        model: str = "",
        max_length: int | None = None,
        timeout: float | None = None,
    ) -> dataset_pb2.Dataset:
        """Uploads a dataset; see `Client.upload`. The data are read in a thread."""
        read, repeatable = uploads.reader(data)
        model = messages.full_name("models", model) if model else ""
        metadata = uploads.metadata(display_name, format, model, max_length)
        failures: list[Exception] = []

        async def parts() -> AsyncIterator[dataset_pb2.UploadDatasetRequest]:
            yield dataset_pb2.UploadDatasetRequest(metadata=metadata)
            try:
                chunks = read()
                while chunk := await asyncio.to_thread(next, chunks, b""):
                    yield dataset_pb2.UploadDatasetRequest(chunk=chunk)
            except Exception as error:
                failures.append(error)
                # The call is cancelled. If the stream ended here, the server would store the part
                # that it has.
                calls_in_progress[-1].cancel()
                raise

        calls_in_progress: list[Any] = []

        async def send(_: None, **settings: Any) -> dataset_pb2.Dataset:
            try:
                call: Any = self._datasets.UploadDataset(parts(), **settings)
                calls_in_progress.append(call)
                answer: dataset_pb2.Dataset = await call
                return answer
            except (grpc.RpcError, asyncio.CancelledError):
                if failures:
                    raise failures[0] from None
                raise

        retry = self._retry if repeatable else RetryPolicy(max_attempts=1)
        deadline = Deadline(given(timeout, self._scoring_timeout))
        return await self._repeat(send, None, deadline, retry, repeatable=False)

    async def dataset(self, name: str, *, timeout: float | None = None) -> dataset_pb2.Dataset:
        """Returns a dataset with the findings of its validation."""
        request = dataset_pb2.GetDatasetRequest(name=messages.full_name("datasets", name))
        return await self._call(self._datasets.GetDataset, request, timeout)

    async def datasets(self, *, timeout: float | None = None) -> AsyncIterator[dataset_pb2.Dataset]:
        """Returns the datasets, newest first, page by page."""
        request = dataset_pb2.ListDatasetsRequest()
        while True:
            page = await self._call(self._datasets.ListDatasets, request, timeout)
            for dataset in page.datasets:
                yield dataset
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete_dataset(
        self, dataset: str | dataset_pb2.Dataset, *, timeout: float | None = None
    ) -> None:
        """Deletes a dataset that no unfinished job uses."""
        request = dataset_pb2.DeleteDatasetRequest(name=messages.name_of(dataset, "datasets"))
        await self._call(self._datasets.DeleteDataset, request, timeout, repeatable=False)

    # Jobs -----------------------------------------------------------------------------------------

    async def train(
        self,
        job: messages.JobLike | None = None,
        *,
        request_id: str | None = None,
        validate_only: bool = False,
        timeout: float | None = None,
        **fields: Any,
    ) -> training_pb2.TrainingJob:
        """Submits a training job and returns it at once; see `Client.train`."""
        request = calls.job_request(job, fields, request_id, validate_only)
        return await self._call(self._training.CreateTrainingJob, request, timeout)

    async def estimate(
        self, job: messages.JobLike | None = None, *, timeout: float | None = None, **fields: Any
    ) -> training_pb2.EstimateTrainingJobResponse:
        """Estimates the cost of a job, which is given as for `train`."""
        created = calls.job_request(job, fields).training_job
        request = training_pb2.EstimateTrainingJobRequest(training_job=created)
        return await self._call(
            self._training.EstimateTrainingJob, request, given(timeout, self._scoring_timeout)
        )

    async def job(self, job: JobLike, *, timeout: float | None = None) -> training_pb2.TrainingJob:
        """Returns a job as it is now."""
        request = training_pb2.GetTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return await self._call(self._training.GetTrainingJob, request, timeout)

    async def jobs(
        self, *states: str, timeout: float | None = None
    ) -> AsyncIterator[training_pb2.TrainingJob]:
        """Returns the jobs, newest first; with states (`"running"`, …) only jobs in these."""
        request = training_pb2.ListTrainingJobsRequest(states=calls.job_states(states))
        while True:
            page = await self._call(self._training.ListTrainingJobs, request, timeout)
            for job in page.training_jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update(
        self, job: JobLike, *, timeout: float | None = None, **fields: Any
    ) -> training_pb2.TrainingJob:
        """Changes display_name, labels, priority or ttl of a job."""
        request = calls.update_request(job, fields)
        return await self._call(self._training.UpdateTrainingJob, request, timeout)

    async def pause(
        self, job: JobLike, *, timeout: float | None = None
    ) -> training_pb2.TrainingJob:
        """Pauses a queued or running job."""
        request = training_pb2.PauseTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return await self._call(self._training.PauseTrainingJob, request, timeout)

    async def resume(
        self, job: JobLike, *, timeout: float | None = None
    ) -> training_pb2.TrainingJob:
        """Requeues a paused job."""
        request = training_pb2.ResumeTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return await self._call(
            self._training.ResumeTrainingJob, request, timeout, repeatable=False
        )

    async def cancel(
        self, job: JobLike, *, timeout: float | None = None
    ) -> training_pb2.TrainingJob:
        """Cancels a job that has not ended."""
        request = training_pb2.CancelTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return await self._call(
            self._training.CancelTrainingJob, request, timeout, repeatable=False
        )

    async def delete_job(self, job: JobLike, *, timeout: float | None = None) -> None:
        """Deletes an ended job with its events and checkpoints."""
        request = training_pb2.DeleteTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        await self._call(self._training.DeleteTrainingJob, request, timeout, repeatable=False)

    async def watch(
        self,
        job: JobLike,
        *,
        after: int = 0,
        tail: int = 0,
        log_to: LogTo | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[training_pb2.TrainingEvent, None]:
        """Returns the events of a job after the sequence number `after`; see `Client.watch`."""
        cursor = calls.EventCursor(job, after, tail, self._retry, timeout)
        logger = open_logger(log_to, _no_job)
        if log_to is not None:
            # Loggers block: W&B and MLflow may wait for their servers.
            await asyncio.to_thread(logger.begin, await self.job(cursor.job))
        with _finished(logger):
            while not cursor.has_ended:
                try:
                    stream = self._training.StreamTrainingEvents(
                        cursor.request(),
                        timeout=cursor.stream_seconds(),
                        metadata=self._address.call_metadata(),
                    )
                    with _cancelled_at_exit(stream):
                        async for event in stream:
                            self._has_answered = True
                            cursor.take(event)
                            if log_to is not None:
                                await asyncio.to_thread(logger.event, event)
                            yield event
                    if not cursor.has_ended:
                        cursor.may_have_ended(await self.job(cursor.job))
                except grpc.RpcError as rpc_error:
                    error = self._explained(from_rpc(rpc_error))
                    delay = cursor.delay(error)
                    if delay is None:
                        raise error from rpc_error
                    await asyncio.sleep(delay)

    async def wait(
        self, job: JobLike, *, timeout: float | None = None, log_to: LogTo | None = None
    ) -> training_pb2.TrainingJob:
        """Waits until a job has ended and returns it; see `Client.wait`."""
        name = messages.name_of(job, "trainingJobs")
        async for _ in self.watch(name, log_to=log_to, timeout=timeout):
            pass
        return await self.job(name)

    async def events(
        self, job: JobLike, *, after: int = 0, timeout: float | None = None
    ) -> AsyncIterator[training_pb2.TrainingEvent]:
        """Returns the stored events of a job after the sequence number `after`."""
        request = training_pb2.ListTrainingEventsRequest(
            parent=messages.name_of(job, "trainingJobs"), after_sequence=after, page_size=1000
        )
        while True:
            page = await self._call(self._training.ListTrainingEvents, request, timeout)
            for event in page.events:
                yield event
            if not page.more or not page.events:
                return
            request.after_sequence = page.events[-1].sequence

    # Checkpoints ----------------------------------------------------------------------------------

    async def checkpoints(
        self, job: JobLike, *, timeout: float | None = None
    ) -> list[checkpoint_pb2.Checkpoint]:
        """Returns the checkpoints of a job, oldest first."""
        parent = messages.name_of(job, "trainingJobs")
        request = checkpoint_pb2.ListCheckpointsRequest(parent=parent)
        answer = await self._call(self._checkpoints.ListCheckpoints, request, timeout)
        return list(answer.checkpoints)

    async def checkpoint(
        self, name: str, *, timeout: float | None = None
    ) -> checkpoint_pb2.Checkpoint:
        """Returns a checkpoint: `trainingJobs/ID/checkpoints/STEP`, also `latest` and `best`."""
        request = checkpoint_pb2.GetCheckpointRequest(name=calls.checkpoint_name(name))
        return await self._call(self._checkpoints.GetCheckpoint, request, timeout)

    async def delete_checkpoint(
        self, checkpoint: str | checkpoint_pb2.Checkpoint, *, timeout: float | None = None
    ) -> None:
        """Deletes a checkpoint that nothing needs."""
        name = calls.checkpoint_name(checkpoint)
        request = checkpoint_pb2.DeleteCheckpointRequest(name=name)
        await self._call(self._checkpoints.DeleteCheckpoint, request, timeout, repeatable=False)

    async def export(
        self,
        checkpoint: PolicyLike,
        *,
        format: str = "",
        dtype: str = "",
        timeout: float | None = None,
    ) -> checkpoint_pb2.ExportCheckpointResponse:
        """Exports a checkpoint (`adapter` or `merged`) into the server's store."""
        request = checkpoint_pb2.ExportCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )
        return await self._call(
            self._checkpoints.ExportCheckpoint, request, given(timeout, self._scoring_timeout)
        )

    async def download(
        self,
        checkpoint: PolicyLike,
        out: str | Path,
        *,
        format: str = "",
        dtype: str = "",
        timeout: float | None = None,
    ) -> list[Path]:
        """Downloads a checkpoint's files into the folder `out`; see `Client.download`."""
        request = checkpoint_pb2.DownloadCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )

        async def receive(_: None, **settings: Any) -> list[Path]:
            stream = self._checkpoints.DownloadCheckpoint(request, **settings)
            with FileWriter(Path(out)) as writer, _cancelled_at_exit(stream):
                async for part in stream:
                    await asyncio.to_thread(writer.take, part)
            return writer.paths

        deadline = Deadline(given(timeout, 3600))
        return await self._repeat(receive, None, deadline, self._retry, repeatable=True)

    # Scoring --------------------------------------------------------------------------------------

    async def score_pairs(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores pairs. The results have the order of the pairs; see `Client.score_pairs`."""
        options = calls.options(policy, arguments)
        deadline = Deadline(given(timeout, self._scoring_timeout))
        chunks = messages.chunks_of(calls.pairs(pairs), calls.PAIRS_PER_CALL, calls.BYTES_PER_CALL)
        return calls.join_responses([await self._score(options, c, deadline) for c in chunks])

    async def _score(
        self,
        options: scoring_pb2.ScoringOptions,
        pairs: Sequence[scoring_pb2.Pair],
        deadline: Deadline,
    ) -> scoring_pb2.ScorePairsResponse:
        run = calls.PairsRun(options, pairs, self._retry)
        while True:
            response = await self._repeat(
                self._scoring.ScorePairs, run.request(), deadline, self._retry, repeatable=True
            )
            delay = run.take(response)
            if delay is None or not deadline.allows(delay):
                return run.response()
            await asyncio.sleep(delay)

    async def score_completions(
        self,
        prompt: Any,
        completions: Iterable[Any],
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> scoring_pb2.ScoreCompletionsResponse:
        """Scores up to 256 answers to a prompt: log-probs, rewards and a ranking."""
        options = calls.options(policy, arguments)
        request = messages.completions_request(
            options, {"prompt": prompt, "completions": list(completions)}
        )
        return await self._call(
            self._scoring.ScoreCompletions, request, given(timeout, self._scoring_timeout)
        )

    async def stream_scores(
        self,
        pairs: Iterable[messages.PairLike] | AsyncIterable[messages.PairLike],
        policy: PolicyLike,
        *,
        timeout: float = 86_400.0,
        **arguments: Unpack[ScoringArguments],
    ) -> AsyncGenerator[scoring_pb2.StreamScorePairsResponse, None]:
        """Scores pairs as they come, in any order; see `Client.stream_scores`."""
        options = calls.options(policy, arguments)
        deadline = Deadline(timeout)
        feed = _Feed(options, _aiter(pairs))
        failures = 0
        while True:
            error: BradleyError | None = None
            try:
                stream: Any = self._scoring.StreamScorePairs(
                    feed.requests(),
                    timeout=max(deadline.remaining(), 0.001),
                    metadata=self._address.call_metadata(),
                )
                feed.cancel = stream.cancel
                with _cancelled_at_exit(stream):
                    async for response in stream:
                        self._has_answered = True
                        error = feed.must_repeat(response, self._retry)
                        if error is not None:
                            break
                        failures = 0
                        if feed.answered(response):
                            yield response
            except grpc.RpcError as rpc_error:
                error = self._explained(from_rpc(rpc_error))
            except asyncio.CancelledError:
                # Either the caller's task is cancelled, or the call, because a row failed.
                if feed.error is None:
                    raise
            if feed.error is not None:
                raise feed.error
            if error is None:
                if feed.is_done():
                    return
                raise calls.protocol_error("the stream ended before all pairs were answered")
            failures += 1
            delay = self._retry.delay(error, failures, repeatable=True)
            if delay is None or not deadline.allows(delay):
                raise error
            await asyncio.sleep(delay)

    # Evaluation -----------------------------------------------------------------------------------

    async def evaluate(
        self,
        policy: PolicyLike,
        dataset: str | dataset_pb2.Dataset,
        *,
        subset_column: str = "",
        score_columns: tuple[str, str] | None = None,
        bins: int = 0,
        save_calibration: bool = False,
        on_progress: Callable[[calls.EvaluationProgress], object] | None = None,
        timeout: float = 86_400.0,
        **arguments: Unpack[ScoringArguments],
    ) -> evaluation_pb2.EvaluationReport:
        """Scores every pair of a dataset and returns the report; see `Client.evaluate`."""
        chosen, rejected = score_columns or ("", "")
        request = calls.evaluation_request(
            policy,
            dataset,
            arguments,
            subset_column=subset_column,
            chosen_score_column=chosen,
            rejected_score_column=rejected,
            bins=bins,
            save_calibration=save_calibration,
        )

        async def receive(_: None, **settings: Any) -> evaluation_pb2.EvaluationReport:
            stream = self._evaluations.EvaluatePolicy(request, **settings)
            evaluation = calls.Evaluation(on_progress)
            with _cancelled_at_exit(stream):
                async for message in stream:
                    evaluation.take(message)
            return evaluation.report()

        return await self._repeat(receive, None, Deadline(timeout), self._retry, repeatable=True)

    # Usage ----------------------------------------------------------------------------------------

    async def usage(
        self,
        owner: str = "",
        *,
        start_date: Any = None,
        end_date: Any = None,
        by_day: bool = False,
        timeout: float | None = None,
    ) -> list[usage_pb2.OwnerUsage]:
        """Returns the work done for owners in a range of days (`datetime.date` or YYYY-MM-DD)."""
        request = calls.usage_request(owner, start_date, end_date, by_day)
        return list((await self._call(self._usage.GetUsage, request, timeout)).usage)

    # Calls ----------------------------------------------------------------------------------------

    async def _call(
        self,
        method: Callable[..., Awaitable[_T]],
        request: object,
        timeout: float | None,
        *,
        repeatable: bool = True,
    ) -> _T:
        deadline = Deadline(given(timeout, self._timeout))
        return await self._repeat(method, request, deadline, self._retry, repeatable=repeatable)

    async def _repeat(
        self,
        method: Callable[..., Awaitable[_T]],
        request: object,
        deadline: Deadline,
        retry: RetryPolicy,
        *,
        repeatable: bool,
    ) -> _T:
        connect = Deadline(self._connect_timeout)
        if not repeatable and not self._has_answered:
            # As in Client.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.channel_ready(), connect.remaining())
        failures = 0
        while True:
            try:
                answer = await method(
                    request,
                    timeout=max(deadline.remaining(), 0.001),
                    metadata=self._address.call_metadata(),
                )
                self._has_answered = True
                return answer
            except grpc.RpcError as rpc_error:
                error = self._explained(from_rpc(rpc_error))
                failures += 1
                delay = retry.delay(error, failures, repeatable=repeatable)
                is_late = not self._has_answered and not connect.allows(delay or 0)
                if delay is None or is_late or not deadline.allows(delay):
                    raise error from rpc_error
                await asyncio.sleep(delay)

    def _explained(self, error: BradleyError) -> BradleyError:
        if not error.is_lost_connection:
            self._has_answered = True
            return error
        return error if self._has_answered else unreachable(self._address, error)


def _no_job() -> training_pb2.TrainingJob:
    raise AssertionError("the job is passed to begin()")


@contextlib.contextmanager
def _finished(logger: EventLogger) -> Iterator[None]:
    """Ends the runs of a logger that has begun."""
    try:
        yield
    finally:
        logger.__exit__()


@contextlib.contextmanager
def _cancelled_at_exit(stream: Any) -> Iterator[None]:
    """Ends a stream that its reader leaves."""
    try:
        yield
    finally:
        stream.cancel()


class _Feed:
    """The requests of a scoring stream, and of the streams that continue it."""

    def __init__(
        self, options: scoring_pb2.ScoringOptions, rows: AsyncIterator[messages.PairLike]
    ) -> None:
        self._options, self._rows = options, rows
        self._source = calls.StreamedPairs()
        self._slots = asyncio.Semaphore(calls.IN_FLIGHT)
        self._reading: asyncio.Future[messages.PairLike | None] | None = None
        self.cancel: Callable[[], object] = lambda: None
        self.error: Exception | None = None

    async def requests(self) -> AsyncIterator[scoring_pb2.StreamScorePairsRequest]:
        yield scoring_pb2.StreamScorePairsRequest(options=self._options)
        for pair in list(self._source.pending.values()):
            yield scoring_pb2.StreamScorePairsRequest(pair=pair)
        try:
            while not self._source.is_exhausted:
                await self._slots.acquire()
                new = None
                try:
                    new = await self._next_pair()
                finally:
                    if new is None:
                        self._slots.release()
                if new is None:
                    return
                yield scoring_pb2.StreamScorePairsRequest(pair=new)
        except Exception as error:
            self.error = error
            # If the requests only ended here, the answers to the earlier ones would still come.
            self.cancel()
            raise

    async def _next_pair(self) -> scoring_pb2.Pair | None:
        # gRPC cancels these requests when the stream breaks. The caller's iterator must survive
        # that, so the next stream awaits the same row.
        self._reading = self._reading or asyncio.ensure_future(self._next_row())
        row = await asyncio.shield(self._reading)
        self._reading = None
        if row is None:
            self._source.is_exhausted = True
            return None
        return self._source.take(row)

    async def _next_row(self) -> messages.PairLike | None:
        async for row in self._rows:
            return row
        return None

    def answered(self, response: scoring_pb2.StreamScorePairsResponse) -> bool:
        is_new = self._source.answered(response)
        if is_new:
            self._slots.release()
        return is_new

    def must_repeat(
        self, response: scoring_pb2.StreamScorePairsResponse, retry: RetryPolicy
    ) -> BradleyError | None:
        return self._source.must_repeat(response, retry)

    def is_done(self) -> bool:
        return self._source.is_exhausted and not self._source.pending


async def _aiter(
    rows: Iterable[messages.PairLike] | AsyncIterable[messages.PairLike],
) -> AsyncIterator[messages.PairLike]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row
