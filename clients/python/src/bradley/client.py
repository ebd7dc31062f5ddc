"""The synchronous client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

import grpc

from bradley import calls, messages, uploads
from bradley.calls import JobLike, PolicyLike, ScoringArguments
from bradley.connection import Address, Pem
from bradley.errors import BradleyError, ErrorInfo, from_info, from_rpc
from bradley.loggers import LogTo, open_logger
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


class Client:
    """A client of a Bradley server, or of several replicas.

    A client may be used by several threads. It connects with its first call.
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
        """Makes a client.

        `target` is http://HOST:PORT, https://HOST:PORT, or dns:///HOST:PORT for several replicas
        (calls go to each of them in turn); by default BRADLEY_SERVER, or http://127.0.0.1:50051.
        `token` is the token, or a function that returns it for each call; by default BRADLEY_TOKEN.
        `ca`, `cert` and `key` are files or contents in PEM format.
        `timeout` is the time of a call with its retries, in seconds, `scoring_timeout` that of
        scoring, and `connect_timeout` the time after which a server that has never answered counts
        as unreachable.
        """
        self._address = Address(target, token, ca, cert, key)
        self._timeout, self._scoring_timeout = timeout, scoring_timeout
        self._connect_timeout = connect_timeout
        self._retry = retry or RetryPolicy()
        self._has_answered = False
        self._channel = self._address.channel()
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._evaluations = evaluation_pb2_grpc.EvaluationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._scoring = scoring_pb2_grpc.ScoringServiceStub(self._channel)
        self._training = training_pb2_grpc.TrainingServiceStub(self._channel)
        self._usage = usage_pb2_grpc.UsageServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection. Calls in progress are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Models ---------------------------------------------------------------------------------------

    def models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """Returns the base models of the server."""
        request = model_pb2.ListModelsRequest()
        return list(self._call(self._models.ListModels, request, timeout).models)

    def model(self, name: str, *, timeout: float | None = None) -> model_pb2.Model:
        """Returns a base model."""
        request = model_pb2.GetModelRequest(name=messages.full_name("models", name))
        return self._call(self._models.GetModel, request, timeout)

    # Datasets -------------------------------------------------------------------------------------

    def upload(
        self,
        data: uploads.DataLike,
        *,
        display_name: str = "",
        format: str = "",
        model: str = "",
        max_length: int | None = None,
        timeout: float | None = None,
    ) -> dataset_pb2.Dataset:
        """Uploads a dataset and returns it with the findings of its validation.

        `data` is a file's path, bytes, an iterator of bytes, an iterable of dicts, a pandas
        DataFrame, a pyarrow Table or a `datasets.Dataset`. With `model`, the lengths of the rows
        are checked with that model's tokenizer. `timeout` is 10 minutes by default. An upload is
        repeated only if the server asks for it, because another one would be another dataset.
        """
        read, repeatable = uploads.reader(data)
        model = messages.full_name("models", model) if model else ""
        metadata = uploads.metadata(display_name, format, model, max_length)
        failures: list[Exception] = []

        def parts() -> Iterator[dataset_pb2.UploadDatasetRequest]:
            yield dataset_pb2.UploadDatasetRequest(metadata=metadata)
            try:
                for chunk in read():
                    yield dataset_pb2.UploadDatasetRequest(chunk=chunk)
            except Exception as error:
                # gRPC cancels the call, so that the server stores nothing.
                failures.append(error)
                raise

        def send(_: None, **settings: Any) -> dataset_pb2.Dataset:
            try:
                return self._datasets.UploadDataset(parts(), **settings)
            except grpc.RpcError:
                if failures:
                    raise failures[0] from None
                raise

        retry = self._retry if repeatable else RetryPolicy(max_attempts=1)
        deadline = Deadline(given(timeout, self._scoring_timeout))
        return self._repeat(send, None, deadline, retry, repeatable=False)

    def dataset(self, name: str, *, timeout: float | None = None) -> dataset_pb2.Dataset:
        """Returns a dataset with the findings of its validation."""
        request = dataset_pb2.GetDatasetRequest(name=messages.full_name("datasets", name))
        return self._call(self._datasets.GetDataset, request, timeout)

    def datasets(self, *, timeout: float | None = None) -> Iterator[dataset_pb2.Dataset]:
        """Returns the datasets, newest first, page by page."""
        request = dataset_pb2.ListDatasetsRequest()
        while True:
            page = self._call(self._datasets.ListDatasets, request, timeout)
            yield from page.datasets
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete_dataset(
        self, dataset: str | dataset_pb2.Dataset, *, timeout: float | None = None
    ) -> None:
        """Deletes a dataset that no unfinished job uses."""
        request = dataset_pb2.DeleteDatasetRequest(name=messages.name_of(dataset, "datasets"))
        self._call(self._datasets.DeleteDataset, request, timeout, repeatable=False)

    # Jobs -----------------------------------------------------------------------------------------

    def train(
        self,
        job: messages.JobLike | None = None,
        *,
        request_id: str | None = None,
        validate_only: bool = False,
        timeout: float | None = None,
        **fields: Any,
    ) -> training_pb2.TrainingJob:
        """Submits a training job and returns it at once.

        The job's fields are those of the message TrainingJob, as a dict or as keywords. Fields of
        dpo, optimizer, lora, batch and run may stand alone: `train(policy="models/x",
        dataset=dataset, beta=0.1, rank=16, learning_rate=1e-4)`. With the same `request_id`, a
        repeated call returns the first job.
        """
        request = calls.job_request(job, fields, request_id, validate_only)
        return self._call(self._training.CreateTrainingJob, request, timeout)

    def estimate(
        self, job: messages.JobLike | None = None, *, timeout: float | None = None, **fields: Any
    ) -> training_pb2.EstimateTrainingJobResponse:
        """Estimates the cost of a job, which is given as for `train`."""
        created = calls.job_request(job, fields).training_job
        request = training_pb2.EstimateTrainingJobRequest(training_job=created)
        return self._call(
            self._training.EstimateTrainingJob, request, given(timeout, self._scoring_timeout)
        )

    def job(self, job: JobLike, *, timeout: float | None = None) -> training_pb2.TrainingJob:
        """Returns a job as it is now."""
        request = training_pb2.GetTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return self._call(self._training.GetTrainingJob, request, timeout)

    def jobs(
        self, *states: str, timeout: float | None = None
    ) -> Iterator[training_pb2.TrainingJob]:
        """Returns the jobs, newest first; with states (`"running"`, …) only jobs in these."""
        request = training_pb2.ListTrainingJobsRequest(states=calls.job_states(states))
        while True:
            page = self._call(self._training.ListTrainingJobs, request, timeout)
            yield from page.training_jobs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update(
        self, job: JobLike, *, timeout: float | None = None, **fields: Any
    ) -> training_pb2.TrainingJob:
        """Changes display_name, labels, priority or ttl of a job."""
        request = calls.update_request(job, fields)
        return self._call(self._training.UpdateTrainingJob, request, timeout)

    def pause(self, job: JobLike, *, timeout: float | None = None) -> training_pb2.TrainingJob:
        """Pauses a queued or running job."""
        request = training_pb2.PauseTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return self._call(self._training.PauseTrainingJob, request, timeout)

    def resume(self, job: JobLike, *, timeout: float | None = None) -> training_pb2.TrainingJob:
        """Requeues a paused job."""
        request = training_pb2.ResumeTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return self._call(self._training.ResumeTrainingJob, request, timeout, repeatable=False)

    def cancel(self, job: JobLike, *, timeout: float | None = None) -> training_pb2.TrainingJob:
        """Cancels a job that has not ended."""
        request = training_pb2.CancelTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        return self._call(self._training.CancelTrainingJob, request, timeout, repeatable=False)

    def delete_job(self, job: JobLike, *, timeout: float | None = None) -> None:
        """Deletes an ended job with its events and checkpoints."""
        request = training_pb2.DeleteTrainingJobRequest(name=messages.name_of(job, "trainingJobs"))
        self._call(self._training.DeleteTrainingJob, request, timeout, repeatable=False)

    def watch(
        self,
        job: JobLike,
        *,
        after: int = 0,
        tail: int = 0,
        log_to: LogTo | None = None,
        timeout: float | None = None,
    ) -> Generator[training_pb2.TrainingEvent, None, None]:
        """Returns the events of a job after the sequence number `after`, until the job ends.

        The cursor is `event.sequence` of the last event, a number that can be saved: a later call
        with `after=cursor` continues behind it, so that no event is lost and none comes twice. Lost
        connections are resumed in the same way. With `tail`, only that many of the newest stored
        events come first. `log_to` names loggers that get the metrics: "wandb", "mlflow",
        "tensorboard", or objects of `bradley.loggers`. Raises `TimeoutError` after `timeout`
        seconds; by default it waits until the job ends.
        """
        cursor = calls.EventCursor(job, after, tail, self._retry, timeout)
        with open_logger(log_to, lambda: self.job(cursor.job)) as logger:
            while not cursor.has_ended:
                try:
                    stream = self._training.StreamTrainingEvents(
                        cursor.request(),
                        timeout=cursor.stream_seconds(),
                        metadata=self._address.call_metadata(),
                    )
                    with _cancelled_at_exit(stream):
                        for event in stream:
                            self._has_answered = True
                            cursor.take(event)
                            logger.event(event)
                            yield event
                    if not cursor.has_ended:
                        cursor.may_have_ended(self.job(cursor.job))
                except grpc.RpcError as rpc_error:
                    error = self._explained(from_rpc(rpc_error))
                    delay = cursor.delay(error)
                    if delay is None:
                        raise error from rpc_error
                    time.sleep(delay)

    def wait(
        self, job: JobLike, *, timeout: float | None = None, log_to: LogTo | None = None
    ) -> training_pb2.TrainingJob:
        """Waits until a job has ended and returns it.

        Raises `TimeoutError` after `timeout` seconds; by default there is no limit. A job that
        failed or was cancelled is returned, too: its `state` and its `error` say so.
        """
        name = messages.name_of(job, "trainingJobs")
        for _ in self.watch(name, log_to=log_to, timeout=timeout):
            pass
        return self.job(name)

    def events(
        self, job: JobLike, *, after: int = 0, timeout: float | None = None
    ) -> Iterator[training_pb2.TrainingEvent]:
        """Returns the stored events of a job after the sequence number `after`."""
        request = training_pb2.ListTrainingEventsRequest(
            parent=messages.name_of(job, "trainingJobs"), after_sequence=after, page_size=1000
        )
        while True:
            page = self._call(self._training.ListTrainingEvents, request, timeout)
            yield from page.events
            if not page.more or not page.events:
                return
            request.after_sequence = page.events[-1].sequence

    # Checkpoints ----------------------------------------------------------------------------------

    def checkpoints(
        self, job: JobLike, *, timeout: float | None = None
    ) -> list[checkpoint_pb2.Checkpoint]:
        """Returns the checkpoints of a job, oldest first."""
        parent = messages.name_of(job, "trainingJobs")
        request = checkpoint_pb2.ListCheckpointsRequest(parent=parent)
        return list(self._call(self._checkpoints.ListCheckpoints, request, timeout).checkpoints)

    def checkpoint(self, name: str, *, timeout: float | None = None) -> checkpoint_pb2.Checkpoint:
        """Returns a checkpoint: `trainingJobs/ID/checkpoints/STEP`, also `latest` and `best`."""
        request = checkpoint_pb2.GetCheckpointRequest(name=calls.checkpoint_name(name))
        return self._call(self._checkpoints.GetCheckpoint, request, timeout)

    def delete_checkpoint(
        self, checkpoint: str | checkpoint_pb2.Checkpoint, *, timeout: float | None = None
    ) -> None:
        """Deletes a checkpoint that nothing needs."""
        name = calls.checkpoint_name(checkpoint)
        request = checkpoint_pb2.DeleteCheckpointRequest(name=name)
        self._call(self._checkpoints.DeleteCheckpoint, request, timeout, repeatable=False)

    def export(
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
        return self._call(
            self._checkpoints.ExportCheckpoint, request, given(timeout, self._scoring_timeout)
        )

    def download(
        self,
        checkpoint: PolicyLike,
        out: str | Path,
        *,
        format: str = "",
        dtype: str = "",
        timeout: float | None = None,
    ) -> list[Path]:
        """Downloads a checkpoint's files into the folder `out` and returns their paths.

        `format` is adapter (PEFT) or merged (transformers); by default it is adapter for LoRA jobs.
        A job means its latest checkpoint. `timeout` is one hour by default.
        """
        folder = Path(out)
        request = checkpoint_pb2.DownloadCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )

        def receive(_: None, **settings: Any) -> list[Path]:
            stream = self._checkpoints.DownloadCheckpoint(request, **settings)
            with _cancelled_at_exit(stream):
                return save_files(stream, folder)

        return self._repeat(
            receive, None, Deadline(given(timeout, 3600)), self._retry, repeatable=True
        )

    # Scoring --------------------------------------------------------------------------------------

    def score_pairs(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores pairs. The results have the order of the pairs.

        A pair is a dict with `prompt`, `chosen` and `rejected` (or `a` and `b`), as texts or chat
        messages. A pair that cannot be scored has an `error` in its result;
        `bradley.errors.from_status` makes an exception of it. More than 256 pairs become several
        calls.
        """
        options = calls.options(policy, arguments)
        deadline = Deadline(given(timeout, self._scoring_timeout))
        chunks = messages.chunks_of(calls.pairs(pairs), calls.PAIRS_PER_CALL, calls.BYTES_PER_CALL)
        return calls.join_responses([self.score_call(options, c, deadline) for c in chunks])

    def score_call(
        self,
        options: scoring_pb2.ScoringOptions,
        pairs: Sequence[scoring_pb2.Pair],
        deadline: Deadline,
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores the pairs of one call. Pairs whose error asks for a retry are sent again."""
        run = calls.PairsRun(options, pairs, self._retry)
        while True:
            response = self._repeat(
                self._scoring.ScorePairs, run.request(), deadline, self._retry, repeatable=True
            )
            delay = run.take(response)
            if delay is None or not deadline.allows(delay):
                return run.response()
            time.sleep(delay)

    def score_completions(
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
        return self._call(
            self._scoring.ScoreCompletions, request, given(timeout, self._scoring_timeout)
        )

    def completions_call(
        self, request: scoring_pb2.ScoreCompletionsRequest, deadline: Deadline
    ) -> scoring_pb2.ScoreCompletionsResponse:
        """Scores the answers of one call."""
        return self._repeat(
            self._scoring.ScoreCompletions, request, deadline, self._retry, repeatable=True
        )

    def stream_scores(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        timeout: float = 86_400.0,
        **arguments: Unpack[ScoringArguments],
    ) -> Generator[scoring_pb2.StreamScorePairsResponse, None, None]:
        """Scores pairs as they come, and returns results as they come, in any order.

        The result of a pair has its `id`, or its number from 0 if it has none. At most 512 pairs
        are in memory. After a lost connection, the unanswered pairs are sent again. `timeout` is
        the time of the whole stream.
        """
        options = calls.options(policy, arguments)
        deadline = Deadline(timeout)
        source = _SharedSource(iter(pairs))
        failures = 0
        while True:
            feed = _Feed(options, source)
            error: BradleyError | None = None
            try:
                stream = self._scoring.StreamScorePairs(
                    feed.requests(),
                    timeout=max(deadline.remaining(), 0.001),
                    metadata=self._address.call_metadata(),
                )
                with _cancelled_at_exit(stream):
                    for response in stream:
                        self._has_answered = True
                        error = source.must_repeat(response, self._retry)
                        if error is not None:
                            break
                        failures = 0
                        if source.answered(response):
                            yield response
            except grpc.RpcError as rpc_error:
                error = self._explained(from_rpc(rpc_error))
            finally:
                feed.stop()
            if feed.error is not None:
                raise feed.error
            if error is None:
                if source.is_done():
                    return
                raise calls.protocol_error("the stream ended before all pairs were answered")
            failures += 1
            delay = self._retry.delay(error, failures, repeatable=True)
            if delay is None or not deadline.allows(delay):
                raise error
            time.sleep(delay)

    # Evaluation -----------------------------------------------------------------------------------

    def evaluate(
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
        """Scores every pair of a dataset, and reports how well the scores agree with it.

        `on_progress` is called about once a second. `subset_column` names a column by whose values
        the accuracy is shown separately, and `score_columns` two columns with given scores of the
        chosen and of the rejected answer. `bins` is the number of bins of the reliability diagram,
        15 by default. With `save_calibration`, the report's calibration is stored with the policy's
        checkpoint, so that its scores have a `calibrated_probability`. `timeout` is the time of the
        whole evaluation. After a lost connection it begins again.
        """
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

        def receive(_: None, **settings: Any) -> evaluation_pb2.EvaluationReport:
            stream = self._evaluations.EvaluatePolicy(request, **settings)
            evaluation = calls.Evaluation(on_progress)
            with _cancelled_at_exit(stream):
                for message in stream:
                    evaluation.take(message)
            return evaluation.report()

        return self._repeat(receive, None, Deadline(timeout), self._retry, repeatable=True)

    # Usage ----------------------------------------------------------------------------------------

    def usage(
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
        return list(self._call(self._usage.GetUsage, request, timeout).usage)

    # Calls ----------------------------------------------------------------------------------------

    def _call(
        self,
        method: Callable[..., _T],
        request: object,
        timeout: float | None,
        *,
        repeatable: bool = True,
    ) -> _T:
        deadline = Deadline(given(timeout, self._timeout))
        return self._repeat(method, request, deadline, self._retry, repeatable=repeatable)

    def _repeat(
        self,
        method: Callable[..., _T],
        request: object,
        deadline: Deadline,
        retry: RetryPolicy,
        *,
        repeatable: bool,
    ) -> _T:
        connect = Deadline(self._connect_timeout)
        if not repeatable and not self._has_answered:
            # Nothing is sent before there is a connection, so that a server that still starts is
            # waited for. If there is none, the call itself says why.
            with contextlib.suppress(grpc.FutureTimeoutError):
                grpc.channel_ready_future(self._channel).result(timeout=connect.remaining())
        failures = 0
        while True:
            try:
                answer = method(
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
                time.sleep(delay)

    def _explained(self, error: BradleyError) -> BradleyError:
        """Adds the address to the error of a server that has never answered."""
        if not error.is_lost_connection:
            self._has_answered = True
            return error
        if self._has_answered:
            return error
        return unreachable(self._address, error)


def unreachable(address: Address, error: BradleyError) -> BradleyError:
    """Returns the error for a server that has never answered."""
    message = (
        f"cannot reach {address.where()[0]}: {error.message}: check the address, that "
        "`bradley serve` runs there, and https:// for a server with TLS"
    )
    return from_info(ErrorInfo(error.code, message, request_id=error.request_id))


def save_files(
    parts: Iterable[checkpoint_pb2.DownloadCheckpointResponse], folder: Path
) -> list[Path]:
    """Writes the files of a download."""
    writer = FileWriter(folder)
    with writer:
        for part in parts:
            writer.take(part)
    return writer.paths


class FileWriter:
    """Writes the files of a download, one after the other."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._open = folder, contextlib.ExitStack()
        self._write: Callable[[bytes], object] | None = None
        self.paths: list[Path] = []

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def take(self, part: checkpoint_pb2.DownloadCheckpointResponse) -> None:
        """Takes the next part: the name of a file, or its next bytes."""
        if part.WhichOneof("part") == "file":
            self._open.close()
            path = calls.inside(self._folder, part.file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write = self._open.enter_context(path.open("wb")).write
            self.paths.append(path)
        elif self._write is None:
            raise calls.protocol_error("a download began without the name of a file")
        else:
            self._write(part.chunk)


@contextlib.contextmanager
def _cancelled_at_exit(stream: Any) -> Iterator[None]:
    """Ends a stream that its reader leaves."""
    try:
        yield
    finally:
        stream.cancel()


class _SharedSource:
    """The pairs of a scoring stream, shared by gRPC's sending thread and the reader."""

    def __init__(self, rows: Iterator[messages.PairLike]) -> None:
        self._rows, self._source = rows, calls.StreamedPairs()
        # Held while the next pair is read, so that a new stream sees every pair of the old one.
        self._reading = threading.Lock()
        self._slots = threading.Semaphore(calls.IN_FLIGHT)

    def unanswered(self) -> list[scoring_pb2.Pair]:
        with self._reading:
            return list(self._source.pending.values())

    def next_pair(self, stopped: threading.Event) -> scoring_pb2.Pair | None:
        """Returns the next pair as soon as there is room; `None` at the end or if stopped."""
        while not self._slots.acquire(timeout=0.1):
            if stopped.is_set():
                return None
        with self._reading:
            if not stopped.is_set() and not self._source.is_exhausted:
                for row in self._rows:
                    return self._source.take(row)
                self._source.is_exhausted = True
        self._slots.release()
        return None

    def answered(self, response: scoring_pb2.StreamScorePairsResponse) -> bool:
        # Without the lock: the caller's next pair may depend on this answer.
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


class _Feed:
    """The requests of one scoring stream."""

    def __init__(self, options: scoring_pb2.ScoringOptions, source: _SharedSource) -> None:
        self._options, self._source = options, source
        self._stopped = threading.Event()
        self.error: Exception | None = None

    def stop(self) -> None:
        self._stopped.set()

    def requests(self) -> Iterator[scoring_pb2.StreamScorePairsRequest]:
        yield scoring_pb2.StreamScorePairsRequest(options=self._options)
        for pair in self._source.unanswered():
            yield scoring_pb2.StreamScorePairsRequest(pair=pair)
        try:
            while (new := self._source.next_pair(self._stopped)) is not None:
                yield scoring_pb2.StreamScorePairsRequest(pair=new)
        except Exception as error:
            self.error = error
            raise
