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
    Sequence,
)
from pathlib import Path
from typing import Any, TypeVar, Unpack

import grpc

from bradley import calls, generation, messages, uploads
from bradley.calls import JobLike, PolicyLike, ScoringArguments
from bradley.connection import Address, Pem
from bradley.downloads import FileWriter
from bradley.errors import BradleyError, protocol_error
from bradley.generation import CompletionDelta, Completions, GenerationRun, SamplingArguments
from bradley.loggers import LogTo, open_logger
from bradley.retry import Deadline, RetryPolicy, given
from bradley.session import Attempts, Session, cancelled_at_exit
from bradley.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    generation_pb2_grpc,
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
        address = Address(target, token, ca, cert, key)
        self._session = Session(
            address,
            retry,
            timeout=timeout,
            scoring_timeout=scoring_timeout,
            connect_timeout=connect_timeout,
        )
        self._channel = address.aio_channel(connect_timeout)
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._evaluations = evaluation_pb2_grpc.EvaluationServiceStub(self._channel)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
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

        retry = None if repeatable else RetryPolicy(max_attempts=1)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        attempts = Attempts(self._session, deadline, repeatable=False, retry=retry)
        return await self._repeat(send, None, attempts)

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
            self._training.EstimateTrainingJob,
            request,
            given(timeout, self._session.scoring_timeout),
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
        cursor = calls.EventCursor(job, after, tail, self._session, timeout)
        logger = open_logger(log_to)
        try:
            if log_to is not None:
                # Loggers block: W&B and MLflow may wait for their servers.
                await asyncio.to_thread(logger.begin, await self.job(cursor.job))
            await self._connect(cursor.attempts)
            while not cursor.has_ended:
                try:
                    stream = self._training.StreamTrainingEvents(
                        cursor.request(), **cursor.settings()
                    )
                    with cancelled_at_exit(stream):
                        async for event in stream:
                            cursor.take(event)
                            if log_to is not None:
                                await asyncio.to_thread(logger.event, event)
                            yield event
                    if not cursor.has_ended:
                        await asyncio.sleep(cursor.delay_after(await self.job(cursor.job)))
                except grpc.RpcError as rpc_error:
                    await asyncio.sleep(cursor.delay(rpc_error))
        finally:
            if log_to is not None:
                await asyncio.to_thread(logger.finish)

    async def wait(
        self, job: JobLike, *, timeout: float | None = None, log_to: LogTo | None = None
    ) -> training_pb2.TrainingJob:
        """Waits until a job has ended and returns it; see `Client.wait`."""
        name = messages.name_of(job, "trainingJobs")
        # Without loggers, the events of the past need not be sent.
        tail = 1 if log_to is None else 0
        async for _ in self.watch(name, tail=tail, log_to=log_to, timeout=timeout):
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
        """Exports a checkpoint into the server's store; `format` and `dtype` as in `download`."""
        request = checkpoint_pb2.ExportCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )
        return await self._call(
            self._checkpoints.ExportCheckpoint,
            request,
            given(timeout, self._session.scoring_timeout),
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
            with cancelled_at_exit(stream), FileWriter(Path(out)) as writer:
                async for part in stream:
                    await asyncio.to_thread(writer.take, part)
                return writer.finish()

        attempts = Attempts(self._session, Deadline(given(timeout, 3600)), repeatable=True)
        return await self._repeat(receive, None, attempts)

    # Scoring --------------------------------------------------------------------------------------

    async def score_pairs(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        logged: str = "",
        timeout: float | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores pairs. The results have the order of the pairs; see `Client.score_pairs`."""
        options = calls.options(policy, arguments)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        whole = calls.pairs(pairs, logged)
        chunks = messages.chunks_of(whole, calls.PAIRS_PER_CALL, calls.BYTES_PER_CALL)
        return calls.join_responses([await self._score(options, c, deadline) for c in chunks])

    async def _score(
        self,
        options: scoring_pb2.ScoringOptions,
        pairs: Sequence[scoring_pb2.Pair],
        deadline: Deadline,
    ) -> scoring_pb2.ScorePairsResponse:
        run = calls.PairsRun(options, pairs, self._session.retry)
        while True:
            attempts = Attempts(self._session, deadline, repeatable=True)
            response = await self._repeat(self._scoring.ScorePairs, run.request(), attempts)
            delay = run.take(response)
            if delay is None or not deadline.allows(delay):
                return run.response()
            await asyncio.sleep(delay)

    async def score_completions(
        self,
        prompt: messages.TextLike,
        completions: Iterable[messages.TextLike],
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
            self._scoring.ScoreCompletions, request, given(timeout, self._session.scoring_timeout)
        )

    async def stream_scores(
        self,
        pairs: Iterable[messages.PairLike] | AsyncIterable[messages.PairLike],
        policy: PolicyLike,
        *,
        logged: str = "",
        timeout: float = 86_400.0,
        **arguments: Unpack[ScoringArguments],
    ) -> AsyncGenerator[scoring_pb2.StreamScorePairsResponse, None]:
        """Scores pairs as they come, in any order; see `Client.stream_scores`.

        The rows of a synchronous iterable are read in the event loop, so they must be at hand.
        """
        options = calls.options(policy, arguments)
        feed = _Feed(options, _aiter(pairs), logged)
        attempts = Attempts(self._session, Deadline(timeout), repeatable=True)
        await self._connect(attempts)
        with contextlib.closing(feed):
            while True:
                error: grpc.RpcError | BradleyError | None = None
                try:
                    stream: Any = self._scoring.StreamScorePairs(
                        feed.requests(),
                        **attempts.settings(),
                    )
                    feed.cancel = stream.cancel
                    with cancelled_at_exit(stream):
                        async for response in stream:
                            error = feed.must_repeat(response, self._session.retry)
                            if error is not None:
                                break
                            attempts.answered()
                            if feed.answered(response):
                                yield response
                except grpc.RpcError as rpc_error:
                    error = rpc_error
                except asyncio.CancelledError:
                    # Either the caller's task is cancelled, or the call, because a row failed.
                    if feed.error is None:
                        raise
                finally:
                    feed.stop()
                if feed.error is not None:
                    raise feed.error
                if error is None:
                    if feed.is_done():
                        return
                    raise protocol_error("the stream ended before all pairs were answered")
                await asyncio.sleep(attempts.delay(error))

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
            with cancelled_at_exit(stream):
                async for message in stream:
                    evaluation.take(message)
            return evaluation.report()

        attempts = Attempts(self._session, Deadline(timeout), repeatable=True)
        return await self._repeat(receive, None, attempts)

    # Generation -----------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: messages.TextLike,
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Completions:
        """Continues a prompt and returns the complete samples; see `Client.generate`."""
        request = generation.request(prompt, policy, arguments)

        async def receive(_: None, **settings: Any) -> Completions:
            stream = self._generation.GenerateCompletions(request, **settings)
            run = GenerationRun(request)
            with cancelled_at_exit(stream):
                async for response in stream:
                    run.take(response)
            return run.completions()

        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        return await self._repeat(receive, None, Attempts(self._session, deadline, repeatable=True))

    async def stream_completions(
        self,
        prompt: messages.TextLike,
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> AsyncGenerator[CompletionDelta, None]:
        """Returns new tokens as they are generated; see `Client.stream_completions`."""
        request = generation.request(prompt, policy, arguments)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        attempts = Attempts(self._session, deadline, repeatable=True)
        await self._connect(attempts)
        while True:
            run = GenerationRun(request)
            try:
                stream = self._generation.GenerateCompletions(request, **attempts.settings())
                with cancelled_at_exit(stream):
                    async for response in stream:
                        attempts.answered()
                        for delta in run.take(response):
                            yield delta
                # Raises an error if a sample is not complete.
                run.completions()
                return
            except grpc.RpcError as rpc_error:
                if run.has_begun:
                    raise self._session.explained(rpc_error) from rpc_error
                await asyncio.sleep(attempts.delay(rpc_error))

    # Usage ----------------------------------------------------------------------------------------

    async def usage(
        self,
        owner: str = "",
        *,
        start_date: calls.Day | None = None,
        end_date: calls.Day | None = None,
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
        deadline = Deadline(given(timeout, self._session.timeout))
        attempts = Attempts(self._session, deadline, repeatable=repeatable)
        return await self._repeat(method, request, attempts)

    async def _connect(self, attempts: Attempts) -> None:
        seconds = attempts.seconds_to_connect()
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.channel_ready(), seconds)
                attempts.connected()

    async def _repeat(
        self, method: Callable[..., Awaitable[_T]], request: object, attempts: Attempts
    ) -> _T:
        await self._connect(attempts)
        while True:
            try:
                answer = await method(request, **attempts.settings())
                attempts.answered()
                return answer
            except grpc.RpcError as rpc_error:
                await asyncio.sleep(attempts.delay(rpc_error))


class _Feed:
    """The requests of a scoring stream, and of the streams that continue it."""

    def __init__(
        self,
        options: scoring_pb2.ScoringOptions,
        rows: AsyncIterator[messages.PairLike],
        logged: str,
    ) -> None:
        self._options, self._rows = options, rows
        self._source = calls.StreamedPairs(logged)
        self._slots = asyncio.Semaphore(calls.IN_FLIGHT)
        self._reading: asyncio.Future[messages.PairLike | None] | None = None
        # The number of the stream whose requests may go on.
        self._stream = 0
        self.cancel: Callable[[], object] = lambda: None
        self.error: Exception | None = None

    def requests(self) -> AsyncIterator[scoring_pb2.StreamScorePairsRequest]:
        """Returns the requests of the next stream, until it is stopped."""
        return self._requests(self._stream)

    async def _requests(self, stream: int) -> AsyncIterator[scoring_pb2.StreamScorePairsRequest]:
        yield scoring_pb2.StreamScorePairsRequest(options=self._options)
        for pair in list(self._source.pending.values()):
            yield scoring_pb2.StreamScorePairsRequest(pair=pair)
        try:
            while (new := await self._next_pair(stream)) is not None:
                yield scoring_pb2.StreamScorePairsRequest(pair=new)
        except Exception as error:
            self.error = error
            # If the requests only ended here, the answers to the earlier ones would still come.
            self.cancel()
            raise

    def stop(self) -> None:
        """Ends the requests of a stream. gRPC leaves them waiting if the stream breaks."""
        self._stream += 1

    def close(self) -> None:
        """Gives up a row that is still awaited."""
        if self._reading is not None:
            self._reading.cancel()

    async def _next_pair(self, stream: int) -> scoring_pb2.Pair | None:
        """Returns the next pair as soon as there is room; `None` at the end or if stopped."""
        await self._slots.acquire()
        pair = None
        try:
            pair = await self._read(stream)
        finally:
            if pair is None:
                self._slots.release()
        return pair

    async def _read(self, stream: int) -> scoring_pb2.Pair | None:
        if stream != self._stream or self._source.is_exhausted:
            return None
        # The row outlives the stream that asks for it first: the next stream awaits the same one.
        self._reading = self._reading or asyncio.ensure_future(self._next_row())
        row = await asyncio.shield(self._reading)
        if stream != self._stream:
            return None
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
