"""Loggers that get the metrics of a job: Weights & Biases, MLflow and TensorBoard.

`client.watch(job, log_to="wandb")` uses the library's own settings (WANDB_MODE,
MLFLOW_TRACKING_URI, …). The classes have settings of their own: `log_to=TensorBoard("runs")`. An
object with the methods of `Logger` is a logger, too. If the watching is resumed by its cursor, the
metrics go to the same run again.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from google.protobuf import json_format

from bradley.v1 import training_pb2


@runtime_checkable
class Logger(Protocol):
    """Takes the metrics of a job."""

    def start(self, job: training_pb2.TrainingJob) -> None:
        """Begins, or continues, the run of a job."""

    def metrics(self, step: int, values: dict[str, float], when: float) -> None:
        """Takes metrics by name, as of a step and a time (seconds since 1970)."""

    def finish(self, state: str) -> None:
        """Ends the run: `succeeded`, `failed`, `cancelled`, or `interrupted` with the watching."""


LogTo = str | Logger | Sequence[str | Logger]
"""One or more loggers: the names "wandb", "mlflow" and "tensorboard", or objects."""


# Fields that the server sets while a job waits and runs.
_OF_THE_RUN = (
    "latest_metrics",
    "progress",
    "etag",
    "state",
    "start_time",
    "end_time",
    "error",
    "replica",
    "replica_time",
    "last_event_time",
    "skipped_rows",
)


def settings_of(job: training_pb2.TrainingJob) -> dict[str, Any]:
    """Returns what a job was created with, as JSON values."""
    shown: dict[str, Any] = json_format.MessageToDict(job, preserving_proto_field_name=True)
    for name in _OF_THE_RUN:
        shown.pop(name, None)
    return shown


def _job_id(job: training_pb2.TrainingJob) -> str:
    return job.name.rpartition("/")[2]


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"log_to={extra!r} needs a library: pip install 'bradley-client[{extra}]' ({error})"
        ) from error


class Wandb:
    """Logs to Weights & Biases. The run has the job's ID."""

    def __init__(self, project: str = "bradley", **settings: Any) -> None:
        """`settings` go to `wandb.init`: entity, mode, dir, tags, …."""
        self._wandb = _library("wandb", "wandb")
        self._settings = {"project": project, **settings}
        self._run: Any = None

    def start(self, job: training_pb2.TrainingJob) -> None:
        """Begins the run, or resumes it."""
        identity = {
            "id": _job_id(job),
            "name": job.display_name or _job_id(job),
            "config": settings_of(job),
            "resume": "allow",
        }
        self._run = self._wandb.init(**{**identity, **self._settings})

    def metrics(self, step: int, values: dict[str, float], when: float) -> None:
        """Logs the metrics of a step."""
        self._run.log(values, step=step)

    def finish(self, state: str) -> None:
        """Ends the run."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("succeeded", "interrupted") else 1)


class MLflow:
    """Logs to MLflow. The run has the tag `bradley.job`, by which it is found again."""

    def __init__(self, experiment: str = "bradley", tracking_uri: str | None = None) -> None:
        """`tracking_uri` is by default that of MLflow: MLFLOW_TRACKING_URI."""
        self._mlflow = _library("mlflow", "mlflow")
        self._client = self._mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._experiment = experiment
        self._run_id = ""

    def start(self, job: training_pb2.TrainingJob) -> None:
        """Begins the run, or resumes it."""
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            known.experiment_id if known else self._client.create_experiment(self._experiment)
        )
        runs = self._client.search_runs([experiment], f"tags.`bradley.job` = '{job.name}'")
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        run = self._client.create_run(
            experiment,
            tags={"bradley.job": job.name},
            run_name=job.display_name or _job_id(job),
        )
        self._run_id = run.info.run_id
        parameter = self._mlflow.entities.Param
        shown = [parameter(name, value) for name, value in _flat("", settings_of(job))]
        for start in range(0, len(shown), 100):
            self._client.log_batch(self._run_id, params=shown[start : start + 100])

    def metrics(self, step: int, values: dict[str, float], when: float) -> None:
        """Logs the metrics of a step."""
        metric = self._mlflow.entities.Metric
        milliseconds = int(when * 1000)
        logged = [metric(name, value, milliseconds, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=logged)

    def finish(self, state: str) -> None:
        """Ends the run."""
        names = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
        # An interrupted run stays as it is, because it may be resumed.
        if state in names:
            self._client.set_terminated(self._run_id, status=names[state])


class TensorBoard:
    """Writes event files of TensorBoard into a folder for each job."""

    def __init__(self, folder: str | Path = "runs") -> None:
        """`folder` is what `tensorboard --logdir` shows."""
        writers = _library("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._make_writer = writers.EventFileWriter
        self._event = _library("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        self._summary = _library("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._folder = Path(folder)
        self._writer: Any = None

    def start(self, job: training_pb2.TrainingJob) -> None:
        """Begins a file in the job's folder. TensorBoard shows all files of a folder as one run."""
        self._writer = self._make_writer(str(self._folder / _job_id(job)))

    def metrics(self, step: int, values: dict[str, float], when: float) -> None:
        """Writes the metrics of a step."""
        points = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        event = self._event(wall_time=when, step=step, summary=self._summary(value=points))
        self._writer.add_event(event)

    def finish(self, state: str) -> None:
        """Closes the file."""
        self._writer.close()


LOGGERS: dict[str, Callable[[], Logger]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
}


def open_logger(log_to: LogTo | None) -> EventLogger:
    """Returns the logger of a watching."""
    given: Sequence[str | Logger]
    if log_to is None:
        given = ()
    elif isinstance(log_to, (str, Logger)):
        given = [log_to]
    else:
        given = log_to
    return EventLogger([_logger(one) for one in given])


def _logger(given: str | Logger) -> Logger:
    if not isinstance(given, str):
        return given
    if given not in LOGGERS:
        raise ValueError(
            f"log_to is {given!r}: it must be one of {', '.join(LOGGERS)}, or a Logger"
        )
    return LOGGERS[given]()


class EventLogger:
    """Passes the metrics of events to loggers."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers
        self._started = contextlib.ExitStack()
        self._state = "interrupted"

    def begin(self, job: training_pb2.TrainingJob) -> None:
        """Begins the runs of all loggers."""
        for logger in self._loggers:
            logger.start(job)
            self._started.callback(self._end, logger)

    def finish(self) -> None:
        """Ends the runs that have begun, also if one of them cannot be ended."""
        self._started.close()

    def _end(self, logger: Logger) -> None:
        logger.finish(self._state)

    def event(self, event: training_pb2.TrainingEvent) -> None:
        """Passes on an event's metrics."""
        when = event.time.ToNanoseconds() / 1e9
        kind = event.WhichOneof("event")
        if kind == "step_metrics":
            values = dict(event.step_metrics.metrics)
            values.setdefault("epoch", event.step_metrics.progress.epoch)
            self._pass_on(event.step_metrics.step, values, when)
        elif kind == "eval_metrics":
            self._pass_on(event.eval_metrics.step, dict(event.eval_metrics.metrics), when)
        elif kind == "state_change":
            name = training_pb2.JobState.Name(event.state_change.to)
            state = name.removeprefix("JOB_STATE_").lower()
            if state in ("succeeded", "failed", "cancelled"):
                self._state = state

    def _pass_on(self, step: int, values: dict[str, float], when: float) -> None:
        for logger in self._loggers:
            logger.metrics(step, values, when)


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Returns a job's settings as MLflow's parameters: dotted names, and texts.

    A label may have any characters, a name of MLflow may not.
    """
    if isinstance(value, dict):
        return [
            item
            for key, inner in value.items()
            for item in _flat(f"{prefix}.{key}" if prefix else key, inner)
        ]
    return [(re.sub(r"[^\w\-. /]", "_", prefix), str(value)[:500])]
