"""`bradley serve` and a client of it, for the comparisons.

The Python needs grpcio-tools and googleapis-common-protos.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import grpc

ROOT = Path(__file__).resolve().parent.parent.parent


def stubs():
    """Compiles the protos, and returns the Python modules by name."""
    folder = tempfile.mkdtemp()
    files = [str(p) for p in (ROOT / "proto/bradley").rglob("*.proto")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
    ]
    subprocess.run([*command, *files], check=True)
    sys.path.insert(0, folder)
    modules = {}
    for name in ("scoring", "training", "dataset", "generation"):
        modules[name] = import_module(f"bradley.v1.{name}_pb2")
        modules[f"{name}_grpc"] = import_module(f"bradley.v1.{name}_pb2_grpc")
    return modules


pb = stubs()


def text(messages):
    s = pb["scoring"]
    return s.Text(
        chat=s.MessageList(
            messages=[s.Message(role=m["role"], content=m["content"]) for m in messages]
        )
    )


def pair(id, row):
    return pb["scoring"].Pair(
        id=str(id), prompt=text(row["prompt"]), a=text(row["chosen"]), b=text(row["rejected"])
    )


class Service:
    """A server with a LoRA checkpoint to score with, because scoring the base against itself would
    need only one pass."""

    def __init__(
        self,
        binary,
        model,
        precision,
        rows,
        max_length,
        port=50100,
        device="cpu",
        log=subprocess.DEVNULL,
        flags=(),
    ):
        self.max_length, self.folder = max_length, tempfile.mkdtemp()
        command = [
            binary,
            "serve",
            "--models",
            f"m={model}",
            "--precision",
            precision,
            "--device",
            device,
            "--listen",
            f"127.0.0.1:{port}",
        ]
        command += ["--http-listen", "off", "--data-dir", self.folder, "--log", "warn", *flags]
        self.child = subprocess.Popen(command, stderr=log)
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", 1 << 28)]
        )
        grpc.channel_ready_future(self.channel).result(timeout=180)
        self.scoring = pb["scoring_grpc"].ScoringServiceStub(self.channel)
        self.training = pb["training_grpc"].TrainingServiceStub(self.channel)
        self.generation = pb["generation_grpc"].GenerationServiceStub(self.channel)
        job = self.submit(rows[-2:], steps=1)
        self.wait(job)
        self.policy = f"{job}/checkpoints/latest"

    def submit(self, rows, steps):
        d, t = pb["dataset"], pb["training"]
        data = "".join(json.dumps(r) + "\n" for r in rows).encode()
        upload = [
            d.UploadDatasetRequest(
                metadata=d.UploadMetadata(display_name="bench", model="models/m")
            ),
            d.UploadDatasetRequest(chunk=data),
        ]
        dataset = pb["dataset_grpc"].DatasetServiceStub(self.channel).UploadDataset(iter(upload))
        job = t.TrainingJob(policy="models/m", dataset=dataset.name)
        job.lora.rank, job.lora.alpha = 16, 32
        job.batch.batch_size, job.batch.max_length, job.batch.max_steps = 1, self.max_length, steps
        return self.training.CreateTrainingJob(t.CreateTrainingJobRequest(training_job=job)).name

    def wait(self, job):
        t = pb["training"]
        while True:
            got = self.training.GetTrainingJob(t.GetTrainingJobRequest(name=job))
            if got.state in (t.JOB_STATE_SUCCEEDED, t.JOB_STATE_FAILED, t.JOB_STATE_CANCELLED):
                assert got.state == t.JOB_STATE_SUCCEEDED, got
                return got
            time.sleep(0.2)

    def options(self):
        return pb["scoring"].ScoringOptions(policy=self.policy, max_length=self.max_length)

    def score(self, rows):
        s = pb["scoring"]
        request = s.ScorePairsRequest(
            options=self.options(), pairs=[pair(i, r) for i, r in enumerate(rows)]
        )
        start = time.perf_counter()
        answer = self.scoring.ScorePairs(request)
        seconds = time.perf_counter() - start
        assert all(r.HasField("score") for r in answer.results), answer
        return {
            "seconds": seconds,
            "pairs": len(rows),
            "peak_bytes": self.peak(),
            "margins": [r.score.margin for r in answer.results],
        }

    def completions(self, prompt, answers):
        s = pb["scoring"]
        request = s.ScoreCompletionsRequest(
            options=self.options(), prompt=text(prompt), completions=[text(a) for a in answers]
        )
        answer = self.scoring.ScoreCompletions(request)
        assert len(answer.ranking) == len(answers), answer

    def peak(self):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def stop(self):
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(60)
