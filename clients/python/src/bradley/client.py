"""The synchronous client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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

        `target` is http://HOST:PORT, https://HOST:PORT with TLS, or dns:///HOST:PORT for several
        replicas (calls go to each of them in turn, over TLS if `ca` or `cert` is given); by default
        BRADLEY_SERVER, or http://127.0.0.1:50051. `token` is the token, or a function that returns
        it for each call; by default BRADLEY_TOKEN. `ca`, `cert` and `key` are paths, or contents
        (as bytes), in PEM format; for https:// they are by default the files that
        BRADLEY_TLS_SERVER_CA, BRADLEY_TLS_CLIENT_CERT and BRADLEY_TLS_CLIENT_KEY name.

        `timeout` is the time of a call with its retries, in seconds, `scoring_timeout` that of
        scoring, generation, uploads, estimates and exports, and `connect_timeout` the time after
        which a server that has never answered counts as unreachable.
        """
        address = Address(target, token, ca, cert, key)
        self._session = Session(
            address,
            retry,
            timeout=timeout,
            scoring_timeout=scoring_timeout,
            connect_timeout=connect_timeout,
        )
        self._channel = address.channel(connect_timeout)
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._evaluations = evaluation_pb2_grpc.EvaluationServiceStub(self._channel)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
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
        DataFrame, a pyarrow Table or a `datasets.Dataset`. `format` is jsonl or parquet; by default
        the server recognises it. With `model`, the lengths of the rows are checked with that
        model's tokenizer against `max_length` (1024 by default). `timeout` is `scoring_timeout` by
        default. An upload is repeated only if the server asks for it, because another one would be
        another dataset, and only if `data` can be read again (no iterator, no open file).
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

        retry = None if repeatable else RetryPolicy(max_attempts=1)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        attempts = Attempts(self._session, deadline, repeatable=False, retry=retry)
        return self._repeat(send, None, attempts)

    def dataset(self, name: str, *, timeout: float | None = None) -> dataset_pb2.Dataset:
        """Returns a dataset with the findings of its validation."""
        request = dataset_pb2.GetDatasetRequest(name=messages.full_name("datasets", name))
        return self._call(self._datasets.GetDataset, request, timeout)

    def datasets(self, *, timeout: float | None = None) -> Iterator[dataset_pb2.Dataset]:
        """Returns the datasets, newest first, page by page. `timeout` is the time of a page."""
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
            self._training.EstimateTrainingJob,
            request,
            given(timeout, self._session.scoring_timeout),
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
        with `after=cursor` continues with the next event, so that none is missed and none comes
        twice. The client does the same after a lost connection. With `tail`, only that many of the
        newest stored events come first. `log_to` names loggers that get the metrics: "wandb",
        "mlflow", "tensorboard", or objects of `bradley.loggers`. Raises `TimeoutError` after
        `timeout` seconds; by default it waits until the job ends.
        """
        cursor = calls.EventCursor(job, after, tail, self._session, timeout)
        logger = open_logger(log_to)
        try:
            if log_to is not None:
                logger.begin(self.job(cursor.job))
            self._connect(cursor.attempts)
            while not cursor.has_ended:
                try:
                    stream = self._training.StreamTrainingEvents(
                        cursor.request(), **cursor.settings()
                    )
                    with cancelled_at_exit(stream):
                        for event in stream:
                            cursor.take(event)
                            logger.event(event)
                            yield event
                    if not cursor.has_ended:
                        time.sleep(cursor.delay_after(self.job(cursor.job)))
                except grpc.RpcError as rpc_error:
                    time.sleep(cursor.delay(rpc_error))
        finally:
            logger.finish()

    def wait(
        self, job: JobLike, *, timeout: float | None = None, log_to: LogTo | None = None
    ) -> training_pb2.TrainingJob:
        """Waits until a job has ended and returns it.

        Raises `TimeoutError` after `timeout` seconds; by default there is no limit. A job that
        failed or was cancelled is returned, too: its `state` and its `error` say so.
        """
        name = messages.name_of(job, "trainingJobs")
        # Without loggers, the events of the past need not be sent.
        tail = 1 if log_to is None else 0
        for _ in self.watch(name, tail=tail, log_to=log_to, timeout=timeout):
            pass
        return self.job(name)

    def events(
        self, job: JobLike, *, after: int = 0, timeout: float | None = None
    ) -> Iterator[training_pb2.TrainingEvent]:
        """Returns the stored events of a job after the sequence number `after`, page by page.

        `timeout` is the time of a page.
        """
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
        """Exports a checkpoint into the server's store; `format` and `dtype` as in `download`."""
        request = checkpoint_pb2.ExportCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )
        return self._call(
            self._checkpoints.ExportCheckpoint,
            request,
            given(timeout, self._session.scoring_timeout),
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

        `format` is adapter (PEFT) or merged (transformers); by default it is adapter for LoRA jobs
        and merged for full fine-tunes. `dtype` is the type of merged weights: f32, bf16 or f16; by
        default that of the base model's files, or f16 where these are quantised. A job means its
        latest checkpoint. A file gets its name when it is complete. `timeout` is one hour by
        default.
        """
        request = checkpoint_pb2.DownloadCheckpointRequest(
            name=calls.checkpoint_name(checkpoint), format=calls.export_format(format), dtype=dtype
        )

        def receive(_: None, **settings: Any) -> list[Path]:
            stream = self._checkpoints.DownloadCheckpoint(request, **settings)
            with cancelled_at_exit(stream), FileWriter(Path(out)) as writer:
                for part in stream:
                    writer.take(part)
                return writer.finish()

        attempts = Attempts(self._session, Deadline(given(timeout, 3600)), repeatable=True)
        return self._repeat(receive, None, attempts)

    # Scoring --------------------------------------------------------------------------------------

    def score_pairs(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        logged: str = "",
        timeout: float | None = None,
        **arguments: Unpack[ScoringArguments],
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores pairs. The results have the order of the pairs.

        A pair is a dict with `prompt`, `chosen` and `rejected` (or `a` and `b`), as texts or chat
        messages. A pair that cannot be scored has an `error` in its result;
        `bradley.errors.from_status` makes an exception of it. More than 256 pairs become several
        calls.

        With `logged`, rows have log-probs that were computed before, each summed over the answer's
        tokens: "reference" takes the reference's from the columns ref_chosen_logps and
        ref_rejected_logps, and "both" also takes the policy's from chosen_logps and rejected_logps.
        """
        options = calls.options(policy, arguments)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        whole = calls.pairs(pairs, logged)
        chunks = messages.chunks_of(whole, calls.PAIRS_PER_CALL, calls.BYTES_PER_CALL)
        return calls.join_responses([self.score_call(options, c, deadline) for c in chunks])

    def score_call(
        self,
        options: scoring_pb2.ScoringOptions,
        pairs: Sequence[scoring_pb2.Pair],
        deadline: Deadline,
    ) -> scoring_pb2.ScorePairsResponse:
        """Scores the pairs of one call. Pairs whose error asks for a retry are sent again."""
        run = calls.PairsRun(options, pairs, self._session.retry)
        while True:
            attempts = Attempts(self._session, deadline, repeatable=True)
            response = self._repeat(self._scoring.ScorePairs, run.request(), attempts)
            delay = run.take(response)
            if delay is None or not deadline.allows(delay):
                return run.response()
            time.sleep(delay)

    def score_completions(
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
        return self._call(
            self._scoring.ScoreCompletions, request, given(timeout, self._session.scoring_timeout)
        )

    def completions_call(
        self, request: scoring_pb2.ScoreCompletionsRequest, deadline: Deadline
    ) -> scoring_pb2.ScoreCompletionsResponse:
        """Scores the answers of one call."""
        attempts = Attempts(self._session, deadline, repeatable=True)
        return self._repeat(self._scoring.ScoreCompletions, request, attempts)

    def stream_scores(
        self,
        pairs: Iterable[messages.PairLike],
        policy: PolicyLike,
        *,
        logged: str = "",
        timeout: float = 86_400.0,
        **arguments: Unpack[ScoringArguments],
    ) -> Generator[scoring_pb2.StreamScorePairsResponse, None, None]:
        """Scores pairs as they come, and returns results as they come, in any order.

        The result of a pair has its `id`, or its number from 0 if it has none. At most 512 pairs
        are in memory. After a lost connection, the unanswered pairs are sent again. `logged` is
        that of `score_pairs`. `timeout` is the time of the whole stream.
        """
        options = calls.options(policy, arguments)
        source = _SharedSource(iter(pairs), logged)
        attempts = Attempts(self._session, Deadline(timeout), repeatable=True)
        self._connect(attempts)
        while True:
            stopped = threading.Event()
            error: grpc.RpcError | BradleyError | None = None
            try:
                stream = self._scoring.StreamScorePairs(
                    source.requests(options, stopped),
                    **attempts.settings(),
                )
                with cancelled_at_exit(stream):
                    for response in stream:
                        error = source.must_repeat(response, self._session.retry)
                        if error is not None:
                            break
                        attempts.answered()
                        if source.answered(response):
                            yield response
            except grpc.RpcError as rpc_error:
                error = rpc_error
            finally:
                source.stop(stopped)
            if source.error is not None:
                raise source.error
            if error is None:
                if source.is_done():
                    return
                raise protocol_error("the stream ended before all pairs were answered")
            time.sleep(attempts.delay(error))

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
        chosen and of the rejected answer, by default `score_chosen` and `score_rejected`. `bins` is
        the number of bins of the reliability diagram, 15 by default. With `save_calibration`, the
        report's calibration is stored with the policy's checkpoint, so that scores with the same
        reference, β and normalization have a `calibrated_probability`. If there is none to store,
        `report.calibration.problem` says why. `timeout` is the time of the whole evaluation. After
        a lost connection it begins again.
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
            with cancelled_at_exit(stream):
                for message in stream:
                    evaluation.take(message)
            return evaluation.report()

        attempts = Attempts(self._session, Deadline(timeout), repeatable=True)
        return self._repeat(receive, None, attempts)

    # Generation -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: messages.TextLike,
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Completions:
        """Continues a prompt, a text or chat messages, and returns the complete samples.

        `timeout` is `scoring_timeout` by default. A call that is repeated has the same seed as
        before.
        """
        request = generation.request(prompt, policy, arguments)

        def receive(_: None, **settings: Any) -> Completions:
            stream = self._generation.GenerateCompletions(request, **settings)
            run = GenerationRun(request)
            with cancelled_at_exit(stream):
                for response in stream:
                    run.take(response)
            return run.completions()

        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        return self._repeat(receive, None, Attempts(self._session, deadline, repeatable=True))

    def stream_completions(
        self,
        prompt: messages.TextLike,
        policy: PolicyLike,
        *,
        timeout: float | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Generator[CompletionDelta, None, None]:
        """Continues a prompt and returns the new tokens of its samples as they are generated.

        The parts of all samples come mixed; the `index` of each says to which sample it belongs. A
        call is repeated only before its first part: a later error is raised. The server ends a call
        whose parts are not read for a minute. `timeout` is `scoring_timeout` by default.
        """
        request = generation.request(prompt, policy, arguments)
        deadline = Deadline(given(timeout, self._session.scoring_timeout))
        attempts = Attempts(self._session, deadline, repeatable=True)
        self._connect(attempts)
        while True:
            run = GenerationRun(request)
            try:
                stream = self._generation.GenerateCompletions(request, **attempts.settings())
                with cancelled_at_exit(stream):
                    for response in stream:
                        attempts.answered()
                        yield from run.take(response)
                # Raises an error if a sample is not complete.
                run.completions()
                return
            except grpc.RpcError as rpc_error:
                if run.has_begun:
                    raise self._session.explained(rpc_error) from rpc_error
                time.sleep(attempts.delay(rpc_error))

    # Usage ----------------------------------------------------------------------------------------

    def usage(
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
        deadline = Deadline(given(timeout, self._session.timeout))
        attempts = Attempts(self._session, deadline, repeatable=repeatable)
        return self._repeat(method, request, attempts)

    def _connect(self, attempts: Attempts) -> None:
        seconds = attempts.seconds_to_connect()
        if seconds > 0:
            ready = grpc.channel_ready_future(self._channel)
            with contextlib.suppress(grpc.FutureTimeoutError):
                ready.result(timeout=seconds)
                attempts.connected()
            ready.cancel()

    def _repeat(self, method: Callable[..., _T], request: object, attempts: Attempts) -> _T:
        self._connect(attempts)
        while True:
            try:
                answer = method(request, **attempts.settings())
                attempts.answered()
                return answer
            except grpc.RpcError as rpc_error:
                time.sleep(attempts.delay(rpc_error))


class _SharedSource:
    """The pairs of a scoring stream, shared by gRPC's sending threads and the reader.

    When a stream breaks, its thread may still wait for the caller's next row. Then the next stream
    begins at once with the unanswered pairs, and gets that row as soon as it comes.
    """

    def __init__(self, rows: Iterator[messages.PairLike], logged: str) -> None:
        self._rows, self._source = rows, calls.StreamedPairs(logged)
        # Held while the caller's next row is awaited.
        self._reading = threading.Lock()
        # Held while a row becomes a pair of a stream, or a stream is stopped.
        self._taking = threading.Lock()
        self._slots = threading.Semaphore(calls.IN_FLIGHT)
        # A row that was read for a stream that had ended: at most one.
        self._left_over: list[messages.PairLike] = []
        self.error: Exception | None = None

    def requests(
        self, options: scoring_pb2.ScoringOptions, stopped: threading.Event
    ) -> Iterator[scoring_pb2.StreamScorePairsRequest]:
        """Returns the requests of one stream."""
        yield scoring_pb2.StreamScorePairsRequest(options=options)
        with self._taking:
            unanswered = list(self._source.pending.values())
        for pair in unanswered:
            yield scoring_pb2.StreamScorePairsRequest(pair=pair)
        while (new := self._next_pair(stopped)) is not None:
            yield scoring_pb2.StreamScorePairsRequest(pair=new)

    def stop(self, stopped: threading.Event) -> None:
        """Ends the requests of a stream."""
        with self._taking:
            stopped.set()

    def _next_pair(self, stopped: threading.Event) -> scoring_pb2.Pair | None:
        """Returns the next pair as soon as there is room; `None` at the end or if stopped."""
        while not self._slots.acquire(timeout=0.1):
            if stopped.is_set():
                return None
        pair = None
        try:
            with self._reading:
                pair = self._read(stopped)
        except Exception as error:
            self.error = error
            raise
        finally:
            if pair is None:
                self._slots.release()
        return pair

    def _read(self, stopped: threading.Event) -> scoring_pb2.Pair | None:
        if self.error is not None:
            raise self.error
        if not (stopped.is_set() or self._left_over or self._source.is_exhausted):
            for row in self._rows:
                self._left_over.append(row)
                break
            else:
                self._source.is_exhausted = True
        with self._taking:
            if stopped.is_set() or not self._left_over:
                return None
            return self._source.take(self._left_over.pop())

    def answered(self, response: scoring_pb2.StreamScorePairsResponse) -> bool:
        """Takes an answer. Returns false if the pair is no longer awaited."""
        is_new = self._source.answered(response)
        if is_new:
            self._slots.release()
        return is_new

    def must_repeat(
        self, response: scoring_pb2.StreamScorePairsResponse, retry: RetryPolicy
    ) -> BradleyError | None:
        """Returns the error of a pair that must be sent again."""
        return self._source.must_repeat(response, retry)

    def is_done(self) -> bool:
        """Returns true if every pair is answered."""
        return self._source.is_exhausted and not (self._left_over or self._source.pending)
