"""A real server on loopback with a tiny model, and what tests share.

BRADLEY_TEST_BINARY names the program under test. The models and rows are those of tests/goldens in
the repository; BRADLEY_TEST_GOLDENS names another folder with them.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bradley import Client
from bradley.v1 import scoring_pb2, training_pb2

GOLDENS = Path(
    os.environ.get("BRADLEY_TEST_GOLDENS", Path(__file__).resolve().parents[3] / "tests/goldens")
)
MODEL = GOLDENS / "models/llama"
START_SECONDS = 120
PACKAGE = Path(__file__).resolve().parents[1]


class Server:
    """The program as a child process."""

    def __init__(self, data: Path, *flags: str, listen: str = "127.0.0.1:0") -> None:
        binary = os.environ.get("BRADLEY_TEST_BINARY")
        if not binary:
            pytest.fail("BRADLEY_TEST_BINARY is not set: it must name the program `bradley`")
        command = [binary, "serve", "--listen", listen, "--http-listen", "off"]
        command += ["--log-format", "json", "--models", f"tiny={MODEL}", "--data-dir", str(data)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BRADLEY_")}
        self.process = subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "BRADLEY_DEVICE": "cpu"},
        )
        self._lines: list[str] = []
        self._served: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        address = self._served.get(timeout=START_SECONDS)
        if address is None:
            pytest.fail("the server has not started:\n" + "".join(self._lines[-20:]))
        self.address: str = address
        self.target = f"http://{address}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            try:
                fields = json.loads(line).get("fields", {})
            except ValueError:
                continue
            if fields.get("message") == "serving":
                self._served.put(fields["address"])
        self._served.put(None)

    def stop(self) -> None:
        """Kills the server. What it acknowledged is on disk."""
        self.process.kill()
        self.process.wait()


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share."""
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.stop()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that end with the test."""
    started: list[Server] = []

    def start(*flags: str, data: Path | None = None, listen: str = "127.0.0.1:0") -> Server:
        folder = data or tmp_path / f"server-{len(started)}"
        started.append(Server(folder, *flags, listen=listen))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.target) as opened:
        yield opened


def read_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a golden JSONL file."""
    return [json.loads(line) for line in (GOLDENS / name).read_text().splitlines() if line]


ROWS = [
    {key: row[key] for key in ("id", "prompt", "chosen", "rejected")}
    for row in [*read_rows("pairs.jsonl"), *read_rows("plain.jsonl")]
]
CHAT_ROWS = [row for row in ROWS if not isinstance(row["prompt"], str)]
PLAIN_ROWS: list[dict[str, str]] = [
    {
        "id": str(i),
        "prompt": f"Question {i}: {'why ' * (i % 5)}?",
        "chosen": f" Because {i}.",
        "rejected": f" It depends{' a lot' * (i % 3)}.",
    }
    for i in range(40)
]
JOB_FIELDS: dict[str, Any] = {
    "policy": "tiny",
    "seed": 1,
    "rank": 4,
    "learning_rate": 0.01,
    "batch_size": 2,
    "max_length": 256,
    "max_steps": 8,
}


@pytest.fixture(scope="session")
def dataset(server: Server) -> str:
    with Client(server.target) as opened:
        return opened.upload(CHAT_ROWS, display_name="pairs", model="tiny").name


@pytest.fixture(scope="session")
def trained(server: Server, dataset: str) -> training_pb2.TrainingJob:
    """A job that has succeeded."""
    with Client(server.target) as opened:
        job = opened.train(JOB_FIELDS, dataset=dataset, save_steps=4, eval_fraction=0.34)
        ended = opened.wait(job, timeout=120)
    assert ended.state == training_pb2.JOB_STATE_SUCCEEDED, ended
    return ended


@pytest.fixture(scope="session")
def policy(trained: training_pb2.TrainingJob) -> str:
    return f"{trained.name}/checkpoints/8"


def scores(
    opened: Client, rows: Sequence[dict[str, Any]], policy: str
) -> list[scoring_pb2.PairScore]:
    """Returns the scores of ScorePairs, with which other ways to score are compared."""
    results = opened.score_pairs(rows, policy).results
    assert all(result.HasField("score") for result in results), results
    return [result.score for result in results]


@pytest.fixture(scope="session")
def plain_scores(server: Server, policy: str) -> list[scoring_pb2.PairScore]:
    with Client(server.target) as opened:
        return scores(opened, PLAIN_ROWS, policy)


def check_scores(rows: Sequence[Any], expected: Sequence[scoring_pb2.PairScore]) -> None:
    """Checks that rows have the scores of ScorePairs, bit for bit."""
    assert len(rows) == len(expected)
    for row, score in zip(rows, expected, strict=True):
        assert row["error"] is None, row
        assert float(row["probability"]).hex() == score.probability.hex(), row
        assert float(row["margin"]).hex() == score.margin.hex(), row
        assert float(row["chosen_reward"]).hex() == score.a.reward.hex(), row
        assert float(row["rejected_reward"]).hex() == score.b.reward.hex(), row
