"""Metrics of a job in the real libraries, in their offline modes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bradley import Client
from bradley.loggers import Logger, MLflow, TensorBoard, Wandb, settings_of
from bradley.v1 import training_pb2

STEPS = list(range(1, 9))


class Recorder:
    """A logger of one's own."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.started: list[str] = []
        self.states: list[str] = []

    def start(self, job: training_pb2.TrainingJob) -> None:
        self.started.append(job.name)

    def metrics(self, step: int, values: dict[str, float], when: float) -> None:
        assert when > 1e9
        self.steps.append((step, values))

    def finish(self, state: str) -> None:
        self.states.append(state)


def watch_in_two_parts(
    client: Client, job: training_pb2.TrainingJob, first: Logger, second: Logger
) -> int:
    """Watches a job, is interrupted after the third step, and goes on at the cursor."""
    cursor = 0
    watching = client.watch(job, log_to=first)
    for event in watching:
        cursor = event.sequence
        if event.step_metrics.step == 3:
            break
    watching.close()
    for _ in client.watch(job, after=cursor, log_to=[second]):
        pass
    return cursor


def test_an_object_is_a_logger(client: Client, trained: training_pb2.TrainingJob) -> None:
    first, second = Recorder(), Recorder()
    watch_in_two_parts(client, trained, first, second)
    assert (first.states, second.states) == (["interrupted"], ["succeeded"])
    assert first.started == second.started == [trained.name]
    steps = [step for step, values in first.steps + second.steps if "loss" in values]
    assert steps == STEPS
    evaluations = [step for step, values in second.steps if "eval_loss" in values]
    assert evaluations == [8]
    with pytest.raises(ValueError, match="must be one of wandb, mlflow, tensorboard, or a Logger"):
        next(iter(client.watch(trained, log_to="comet")))


def test_every_logger_that_has_begun_ends(
    client: Client, trained: training_pb2.TrainingJob
) -> None:
    class Broken(Recorder):
        def start(self, job: training_pb2.TrainingJob) -> None:
            raise OSError("the disk is full")

    class Unwilling(Recorder):
        def finish(self, state: str) -> None:
            raise OSError("the disk is full")

    first, second = Recorder(), Recorder()
    with pytest.raises(OSError, match="full"):
        next(client.watch(trained, log_to=[first, Broken()]))
    with pytest.raises(OSError, match="full"):
        client.wait(trained, log_to=[second, Unwilling()])
    assert (first.states, second.states) == (["interrupted"], ["succeeded"])


def losses(client: Client, job: training_pb2.TrainingJob) -> list[float]:
    events = client.events(job)
    return [e.step_metrics.metrics["loss"] for e in events if e.HasField("step_metrics")]


def test_wandb(
    client: Client,
    trained: training_pb2.TrainingJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")

    def logger() -> Wandb:
        return Wandb(mode="offline", dir=str(tmp_path))

    watch_in_two_parts(client, trained, logger(), logger())
    found: dict[int, float] = {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(path.stem == f"run-{trained.name.rpartition('/')[2]}" for path in files)
    # W&B's own process writes the end of a file after `finish` has returned.
    deadline = time.monotonic() + 60
    while len(found) < len(STEPS) and time.monotonic() < deadline:
        time.sleep(0.1)
        for path in files:
            found |= {s: values["loss"] for s, values in _wandb_history(path) if "loss" in values}
    assert list(found) == STEPS
    # W&B writes the last digits differently.
    assert list(found.values()) == pytest.approx(losses(client, trained), rel=1e-12)


def _wandb_history(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the logged steps of an offline run."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            steps.append((record.history.step.num or values.get("_step", 0), values))
    return steps


def _log_records(data: bytes) -> Iterator[bytes]:
    """Returns the records of a file of LevelDB's log format, with a header of 7 bytes."""
    block, position, whole = 32768, 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        # 1: a whole record, 4: the last part of one; 2 and 3: the parts before that.
        if kind in (1, 4):
            yield whole
            whole = b""


def test_mlflow(
    client: Client,
    trained: training_pb2.TrainingJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow = pytest.importorskip("mlflow")
    # The store of files is enough for a test. Newer versions ask for this variable.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    watch_in_two_parts(client, trained, MLflow("dpo", uri), MLflow("dpo", uri))
    store = mlflow.MlflowClient(tracking_uri=uri)
    experiment = store.get_experiment_by_name("dpo")
    [run] = store.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "4"
    assert run.data.tags["bradley.job"] == trained.name
    history = store.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == list(
        zip(STEPS, losses(client, trained), strict=True)
    )
    assert "eval_rewards/margins" in run.data.metrics


def test_tensorboard(client: Client, trained: training_pb2.TrainingJob, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch_in_two_parts(client, trained, TensorBoard(tmp_path), TensorBoard(tmp_path))
    shown = EventAccumulator(str(tmp_path / trained.name.rpartition("/")[2]))
    shown.Reload()
    points = shown.Scalars("loss")
    assert [point.step for point in points] == STEPS
    # TensorBoard stores single precision.
    assert [p.value for p in points] == pytest.approx(losses(client, trained), rel=1e-6)
    assert shown.Scalars("eval_loss")[0].step == 8


def test_settings_are_what_the_job_was_created_with() -> None:
    job = training_pb2.TrainingJob(
        name="trainingJobs/1",
        policy="models/m",
        state=training_pb2.JOB_STATE_RUNNING,
        replica="pod",
        skipped_rows=["row 1: the prompt is missing"],
    )
    job.replica_time.GetCurrentTime()
    job.last_event_time.GetCurrentTime()
    assert settings_of(job) == {"name": "trainingJobs/1", "policy": "models/m"}


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'bradley-client\[wandb\]'"):
        Wandb()
