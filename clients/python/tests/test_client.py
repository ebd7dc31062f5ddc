"""The client against a real server: datasets, jobs, events, checkpoints, scores, usage."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import (
    CHAT_ROWS,
    GOLDENS,
    JOB_FIELDS,
    PLAIN_ROWS,
    ROWS,
    Server,
    StartServer,
    scores,
)

from bradley import (
    BradleyError,
    Client,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    Scorer,
    UnauthenticatedError,
    UnavailableError,
)
from bradley.errors import from_status
from bradley.v1 import checkpoint_pb2, dataset_pb2, training_pb2

PAIRS = GOLDENS / "pairs.jsonl"
PROMPT = "What is the capital of France?"


def test_models_are_listed(client: Client) -> None:
    [model] = client.models()
    assert (model.name, model.architecture) == ("models/tiny", "llama")
    assert client.model("tiny") == model


def _frame() -> Any:
    return pytest.importorskip("pandas").DataFrame(CHAT_ROWS)


def _table() -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(CHAT_ROWS)


def _dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(CHAT_ROWS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PAIRS,
        lambda: str(PAIRS),
        lambda: PAIRS.read_bytes(),
        lambda: iter([PAIRS.read_bytes()[:777], PAIRS.read_bytes()[777:]]),
        lambda: PAIRS.open("rb"),
        lambda: CHAT_ROWS,
        lambda: iter(CHAT_ROWS),
        _frame,
        _table,
        _dataset,
    ],
    ids=[
        "path",
        "str",
        "bytes",
        "iterator",
        "file",
        "dicts",
        "dicts-once",
        "pandas",
        "arrow",
        "hf",
    ],
)
def test_every_kind_of_data_is_uploaded(client: Client, make: Callable[[], Any]) -> None:
    uploaded = client.upload(make(), display_name="kinds", model="models/tiny", max_length=256)
    assert uploaded.report.valid_rows == uploaded.report.rows == len(CHAT_ROWS), uploaded
    assert (uploaded.display_name, uploaded.report.max_length) == ("kinds", 256)
    assert client.dataset(uploaded.name).content_hash == uploaded.content_hash
    client.delete_dataset(uploaded)
    with pytest.raises(NotFoundError):
        client.dataset(uploaded.name)


def test_datasets_are_listed_page_by_page(client: Client) -> None:
    names = [client.upload(CHAT_ROWS[:1]).name for _ in range(51)]
    listed = [one.name for one in client.datasets()]
    assert listed[:51] == names[::-1]
    for name in names:
        client.delete_dataset(name)


def test_an_upload_whose_rows_fail_stores_nothing(client: Client) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield CHAT_ROWS[0]
        raise OSError("the disk is gone")

    before = [one.name for one in client.datasets()]
    with pytest.raises(OSError, match="the disk is gone"):
        client.upload(rows())
    with pytest.raises(ValueError, match="row 2: object is no JSON value"):
        client.upload([CHAT_ROWS[0], {"prompt": object()}])
    with pytest.raises(TypeError, match="give a path, bytes, rows"):
        client.upload({"prompt": "one row is no dataset"})
    assert [one.name for one in client.datasets()] == before


def test_a_job_is_made_of_single_fields_and_whole_messages(client: Client, dataset: str) -> None:
    job = client.train(
        {"policy": "tiny", "lora": {"rank": 4}, "labels": {"team": "a"}},
        dataset=client.dataset(dataset),
        validate_only=True,
        lora={"alpha": 3},
        target_modules=["q_proj"],
        losses=[{"loss_type": "ipo"}],
        beta=0.3,
        epochs=2,
    )
    assert (job.policy, job.dataset, job.name) == ("models/tiny", dataset, "")
    assert (job.lora.rank, job.lora.alpha, list(job.lora.target_modules)) == (4, 3, ["q_proj"])
    assert (job.dpo.beta, job.dpo.losses[0].loss_type) == (0.3, "ipo")
    assert (job.batch.epochs, dict(job.labels)) == (2, {"team": "a"})
    estimate = client.estimate(job, epochs=1)
    assert estimate.train_pairs == len(CHAT_ROWS)
    with pytest.raises(ValueError, match="learning_rat is no field of a job; learning_rate is one"):
        client.train(policy="tiny", dataset=dataset, learning_rat=1)
    with pytest.raises(ValueError, match='has no field named "rnk"'):
        client.train(policy="tiny", dataset=dataset, lora={"rnk": 1})


def test_a_repeated_request_is_one_job(client: Client, dataset: str) -> None:
    made = [
        client.train(JOB_FIELDS, dataset=dataset, request_id="once", display_name="once")
        for _ in range(2)
    ]
    assert made[0].name == made[1].name
    ended = client.wait(made[0], timeout=60)
    assert ended.state == training_pb2.JOB_STATE_SUCCEEDED
    assert made[0].name in [job.name for job in client.jobs("succeeded")]
    assert made[0].name not in [job.name for job in client.jobs("queued", "running")]
    changed = client.update(ended, display_name="twice", labels={"a": "b"})
    assert (changed.display_name, dict(changed.labels)) == ("twice", {"a": "b"})
    client.delete_job(ended)
    with pytest.raises(NotFoundError):
        client.job(ended.name)


def test_events_come_once_and_in_order(client: Client, trained: training_pb2.TrainingJob) -> None:
    events = list(client.watch(trained))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events == list(client.events(trained))
    steps = [e.step_metrics.step for e in events if e.HasField("step_metrics")]
    assert steps == list(range(1, 9))
    assert list(client.watch(trained, after=5)) == events[5:]
    assert list(client.watch(trained, tail=2)) == events[-2:]
    assert list(client.watch(trained, after=len(events))) == []
    with pytest.raises(OutOfRangeError):
        list(client.watch(trained, after=len(events) + 1))


WATCHER = """
import json, os, sys
from bradley import Client
target, job, out = sys.argv[1:]
lines = open(out).read().splitlines() if os.path.exists(out) else []
cursor = json.loads(lines[-1]) if lines else 0
with open(out, "a") as saved:
    for event in Client(target).watch(job, after=cursor):
        saved.write(json.dumps(event.sequence) + "\\n")
        saved.flush()
"""


def test_a_watcher_that_is_killed_continues_at_its_cursor(
    client: Client, server: Server, dataset: str, tmp_path: Path
) -> None:
    job = client.train(JOB_FIELDS, dataset=dataset, max_steps=100_000, display_name="killed")
    out = tmp_path / "cursor"
    kills = 0
    while True:
        before = _lines(out)
        watcher = subprocess.Popen([sys.executable, "-c", WATCHER, server.target, job.name, out])
        while watcher.poll() is None and (kills == 3 or _lines(out) < before + 5):
            time.sleep(0.002)
        if watcher.poll() is None:
            os.kill(watcher.pid, signal.SIGKILL)
            kills += 1
            if kills == 3:
                client.cancel(job)
        if watcher.wait() == 0:
            break
    assert kills == 3
    stored = [event.sequence for event in client.events(job)]
    assert [int(line) for line in out.read_text().splitlines()] == stored


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_watching_and_scoring_survive_the_restart_of_the_server(
    start_server: StartServer, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    server = start_server(data=data)
    with Client(server.target) as client:
        dataset = client.upload(CHAT_ROWS)
        job = client.train(JOB_FIELDS, dataset=dataset, max_steps=30, save_steps=1)
        seen = []

        def rows() -> Iterator[dict[str, str]]:
            for i, row in enumerate(PLAIN_ROWS):
                if i == 30:
                    killed.wait(60)
                yield row

        killed = threading.Event()
        streamed = client.stream_scores(rows(), "tiny")
        answers = [next(streamed) for _ in range(10)]
        for event in client.watch(job):
            seen.append(event.sequence)
            if len(seen) == 10:
                server.stop()
                # The same port and data.
                start_server(data=data, listen=server.address)
                killed.set()
        answers += list(streamed)
        assert seen == [event.sequence for event in client.events(job)]
        assert client.job(job).state == training_pb2.JOB_STATE_SUCCEEDED
        expected = scores(client, PLAIN_ROWS, "tiny")
    assert sorted(int(a.result.id) for a in answers) == list(range(len(PLAIN_ROWS)))
    for answer in answers:
        assert answer.result.score == expected[int(answer.result.id)]


def test_checkpoints_are_listed_and_downloaded(
    client: Client, trained: training_pb2.TrainingJob, tmp_path: Path
) -> None:
    listed = client.checkpoints(trained)
    assert [checkpoint.step for checkpoint in listed] == [4, 8]
    assert client.checkpoint(f"{trained.name}/checkpoints/latest") == listed[-1]
    paths = client.download(trained, tmp_path / "adapter")
    assert {path.name for path in paths} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4
    exported = client.export(listed[0], format="adapter")
    assert {file.path for file in exported.files} >= {"adapter_config.json"}
    merged = client.download(listed[0], tmp_path / "merged", format="merged", dtype="bf16")
    assert "model.safetensors" in {path.name for path in merged}
    client.delete_checkpoint(listed[0])
    assert [checkpoint.step for checkpoint in client.checkpoints(trained)] == [8]


def test_files_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    from bradley.downloads import FileWriter

    for name in ["../x", "/x", "a/b/c", ".hidden", "a/../b", ""]:
        part = checkpoint_pb2.DownloadCheckpointResponse(
            file=checkpoint_pb2.ExportedFile(path=name)
        )
        with (
            pytest.raises(BradleyError, match="is not allowed"),
            FileWriter(tmp_path / "out") as writer,
        ):
            writer.take(part)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_paused_job_is_resumed_and_cancelled(client: Client, dataset: str) -> None:
    job = client.train(JOB_FIELDS, dataset=dataset, max_steps=100_000)
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.3 seconds"):
        client.wait(job, timeout=0.3)
    client.pause(job)
    for event in client.watch(job, timeout=60):
        if event.state_change.to == training_pb2.JOB_STATE_PAUSED:
            client.resume(job)
        if event.step_metrics.step and client.job(job).state == training_pb2.JOB_STATE_RUNNING:
            client.cancel(job)
            break
    assert client.wait(job, timeout=60).state == training_pb2.JOB_STATE_CANCELLED


def test_scores_are_those_of_every_way(client: Client, policy: str) -> None:
    whole = client.score_pairs(ROWS, policy)
    assert [result.id for result in whole.results] == [row["id"] for row in ROWS]
    assert whole.policy_version == policy
    assert all(result.score.probability != 0.5 for result in whole.results)
    # The same rows as a stream, and in another call with other names of the columns.
    streamed = {a.result.id: a.result.score for a in client.stream_scores(ROWS, policy)}
    named = [{"prompt": r["prompt"], "a": r["chosen"], "b": r["rejected"]} for r in ROWS]
    for result, other in zip(whole.results, client.score_pairs(named, policy).results, strict=True):
        assert result.score == other.score == streamed[result.id]
    for row, result in zip(ROWS, whole.results, strict=True):
        answers = [row["chosen"], row["rejected"]]
        scored = client.score_completions(row["prompt"], answers, policy)
        assert [r.score for r in scored.results] == [result.score.a, result.score.b]
        assert list(scored.ranking) == ([0, 1] if result.score.margin > 0 else [1, 0])
    details = client.score_pairs(
        ROWS[:1], policy, per_token_logprobs=True, beta=0.7, normalization="mean", reference="tiny"
    )
    score = details.results[0].score
    assert len(score.a.policy_token_logprobs) == score.a.tokens
    assert score.margin != whole.results[0].score.margin


def test_many_pairs_are_several_calls(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bradley.calls.PAIRS_PER_CALL", 16)
    send = client._scoring.ScorePairs
    sizes: list[int] = []

    def counted(request: Any, **settings: Any) -> Any:
        sizes.append(len(request.pairs))
        return send(request, **settings)

    monkeypatch.setattr(client._scoring, "ScorePairs", counted)
    whole = client.score_pairs(PLAIN_ROWS, "tiny")
    assert sizes == [16, 16, 8]
    assert [r.id for r in whole.results] == [row["id"] for row in PLAIN_ROWS]
    assert whole.warnings, "the base model is its own reference"
    assert len(set(whole.warnings)) == len(whole.warnings)


def test_rows_mean_the_same_as_for_the_command_line(
    server: Server, client: Client, policy: str, tmp_path: Path
) -> None:
    """Other shapes of rows, tools and arguments, against `bradley score`."""
    first = CHAT_ROWS[0]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2.0}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1}}}]}
    dialogue = {k: first["prompt"] + first[k] for k in ("chosen", "rejected")}
    rows: list[dict[str, Any]] = [
        *ROWS,
        {**first, "system": "Be brief."},
        {**first, "tools": [tool], "chat_template_kwargs": {"x": 1.0}},
        {**first, "chosen": [{**call, "content": None}]},
        dialogue,
        {**dialogue, "prompt": first["prompt"][0]["content"]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", "--server", server.target, "--policy", policy, "--data", str(data)]
    said = subprocess.run(
        [os.environ["BRADLEY_TEST_BINARY"], *command, "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [json.loads(line) for line in said.stdout.splitlines()]
    found = scores(client, rows, policy)
    assert [score.margin for score in found] == [row["margin"] for row in expected]
    # The last two rows are the first one again, and the template shows no tools.
    assert len({score.margin for score in found}) == len(rows) - 3


def test_whole_dialogues_are_pairs(client: Client, policy: str) -> None:
    whole = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in CHAT_ROWS
    ]
    assert scores(client, whole, policy) == scores(client, CHAT_ROWS, policy)


def test_a_pair_that_cannot_be_scored_has_an_error(client: Client) -> None:
    bad = {**CHAT_ROWS[0], "prompt": [{"x": 1}]}
    results = client.score_pairs([PLAIN_ROWS[0], bad], "tiny").results
    assert results[0].HasField("score")
    error = from_status(results[1].error)
    assert isinstance(error, InvalidArgumentError)
    assert error.violations, error
    with pytest.raises(ValueError, match=r"pairs\[1\]: chosen: is missing"):
        client.score_pairs([PLAIN_ROWS[0], {"prompt": "x"}], "tiny")
    with pytest.raises(ValueError, match=r"pairs\[1\]: chosen: is missing"):
        list(client.stream_scores([PLAIN_ROWS[0], {"prompt": "x"}], "tiny"))


def test_logged_log_probs_replace_those_of_the_models(client: Client, policy: str) -> None:
    given = PLAIN_ROWS[:8]
    found = scores(client, given, policy)
    assert not any(score.logged for score in found)
    rows: list[dict[str, Any]] = [
        {
            **row,
            "ref_chosen_logps": score.a.reference_logprob,
            "ref_rejected_logps": score.b.reference_logprob,
            "chosen_logps": score.a.policy_logprob,
            "rejected_logps": score.b.policy_logprob,
        }
        for row, score in zip(given, found, strict=True)
    ]
    margins = [score.margin for score in found]
    for logged in ("reference", "both"):
        scored = [r.score for r in client.score_pairs(rows, policy, logged=logged).results]
        assert all(score.logged for score in scored)
        assert [score.margin for score in scored] == margins
        streamed = {
            answer.result.id: answer.result.score
            for answer in client.stream_scores(rows, policy, logged=logged)
        }
        assert all(score.logged for score in streamed.values())
        assert [streamed[row["id"]].margin for row in rows] == margins
    # Without the argument, the columns have no meaning.
    assert scores(client, rows, policy) == found
    other = {**rows[0], "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    other = {**other, "chosen_logps": -3.5, "rejected_logps": -1.5}
    response = client.score_pairs([other], policy, logged="both", beta=0.5, normalization="sum")
    assert response.results[0].score.margin == pytest.approx(0.5 * ((-3.5 + 1) - (-1.5 + 2)))
    for column, value, problem in (
        ("ref_rejected_logps", None, "is missing; add"),
        ("chosen_logps", None, "is missing; add"),
        ("ref_chosen_logps", 0.5, "is 0.5; a log-prob is a finite number, at most 0"),
        ("rejected_logps", float("-inf"), "is -inf; a log-prob is a finite"),
        ("ref_chosen_logps", "-3", "is str; give one number for the answer"),
        ("ref_chosen_logps", [-3.0], "is list; give one number for the answer"),
    ):
        expected = re.escape(f"pairs[1]: {column}: {problem}")
        with pytest.raises(ValueError, match=expected):
            client.score_pairs([rows[0], {**rows[1], column: value}], policy, logged="both")
    with pytest.raises(ValueError, match="logged is 'policy': it must be reference or both"):
        client.score_pairs(rows, policy, logged="policy")
    with pytest.raises(ValueError, match="logged is 'policy': it must be reference or both"):
        list(client.stream_scores(rows, policy, logged="policy"))


def test_samples_are_those_of_the_command_line(server: Server, client: Client, policy: str) -> None:
    settings: dict[str, Any] = {
        "samples": 2,
        "max_tokens": 12,
        "seed": 5,
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["zzzz"],
    }
    question = [{"role": "user", "content": PROMPT}]
    whole = client.generate(question, policy, logprobs=True, **settings)
    command = ["generate", "--server", server.target, "--policy", policy, "--prompt", PROMPT]
    command += ["--samples", "2", "--max-tokens", "12", "--seed", "5", "--temperature", "0.9"]
    command += ["--top-p", "0.9", "--top-k", "40", "--stop", "zzzz", "--format", "json"]
    said = subprocess.run(
        [os.environ["BRADLEY_TEST_BINARY"], *command], capture_output=True, text=True, check=True
    )
    expected = json.loads(said.stdout)
    assert (whole.policy_version, whole.seed) == (expected["policy"], expected["seed"])
    assert whole.prompt_tokens == expected["prompt_tokens"]
    assert whole.completion_tokens == sum(len(sample.token_ids) for sample in whole.samples)
    for sample, other in zip(whole.samples, expected["samples"], strict=True):
        assert (sample.text, sample.finish_reason) == (other["text"], other["finish_reason"])
        assert len(sample.token_ids) == len(sample.token_logprobs) == other["tokens"]
        assert sample.logprob == pytest.approx(other["logprob"])


def test_samples_are_streamed_and_repeat_with_their_seed(client: Client) -> None:
    settings: dict[str, Any] = {"seed": 7, "max_tokens": 40, "ignore_eos": True}
    whole = client.generate(PROMPT, "tiny", samples=3, **settings)
    assert (whole.policy_version, whole.seed, whole.completion_tokens) == ("models/tiny", 7, 120)
    assert {sample.finish_reason for sample in whole.samples} == {"length"}
    assert [sample.logprob for sample in whole.samples] == [None] * 3
    first = whole.samples[0]
    assert whole.text == first.text != whole.samples[1].text
    texts, reasons = [""] * 3, [""] * 3
    tokens: list[tuple[int, ...]] = [()] * 3
    for delta in client.stream_completions(PROMPT, "tiny", samples=3, **settings):
        assert not reasons[delta.index], "nothing follows the last token"
        texts[delta.index] += delta.text
        tokens[delta.index] += delta.token_ids
        reasons[delta.index] = delta.finish_reason
        assert (delta.policy_version, delta.seed) == ("models/tiny", 7)
    assert texts == [sample.text for sample in whole.samples]
    assert tokens == [sample.token_ids for sample in whole.samples]
    assert reasons == ["length"] * 3
    # A stream may be left.
    left = client.stream_completions(PROMPT, "tiny", max_tokens=4000, ignore_eos=True)
    next(left)
    left.close()
    stop, token = first.text[4:6], first.token_ids[9]
    [stopped] = client.generate(PROMPT, "tiny", stop=stop, **settings).samples
    assert (stopped.text, stopped.finish_reason) == (first.text.partition(stop)[0], "stop")
    assert stopped.token_ids == first.token_ids[: len(stopped.token_ids)]
    [stopped] = client.generate(PROMPT, "tiny", stop_token_ids=[token], **settings).samples
    assert stopped.token_ids == first.token_ids[: first.token_ids.index(token) + 1]
    # Without a seed, each call has another one.
    chosen = client.generate(PROMPT, "tiny", samples=2, max_tokens=8)
    assert client.generate(PROMPT, "tiny", samples=2, max_tokens=8, seed=chosen.seed) == chosen
    assert client.generate(PROMPT, "tiny", max_tokens=8).seed != chosen.seed
    greedy = client.generate(PROMPT, "tiny", samples=2, max_tokens=8, temperature=0)
    assert greedy.samples[0] == greedy.samples[1]


def test_refused_generations_name_their_fields(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        client.generate("x", "tiny", samples=65, top_p=2.0)
    assert {violation.field for violation in refused.value.violations} == {"samples", "top_p"}
    with pytest.raises(NotFoundError):
        client.generate("x", "no-such-model")
    with pytest.raises(NotFoundError):
        list(client.stream_completions("x", "no-such-model"))
    with pytest.raises(BradleyError, match="applies only to chat messages"):
        client.generate("x", "tiny", tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(ValueError, match="max_tokens is 0: it must be at least 1"):
        client.generate("x", "tiny", max_tokens=0)
    nothing: Any = None
    with pytest.raises(ValueError, match="prompt: is missing"):
        client.generate(nothing, "tiny")


def test_usage_is_counted(client: Client, policy: str) -> None:
    client.score_pairs(PLAIN_ROWS, policy)
    deadline = time.monotonic() + 60
    while not (usage := client.usage(by_day=True)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert usage[0].scored_pairs > 0
    assert usage[0].date


def test_errors_have_the_fields_of_the_server(client: Client, dataset: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        client.train(policy="tiny", dataset=dataset, beta=-1.0, epochs=-1.0)
    error = refused.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    fields = {violation.field for violation in error.violations}
    assert fields == {"training_job.dpo.beta", "training_job.batch.epochs"}
    assert error.request_id
    assert error.retry_delay is None
    with pytest.raises(NotFoundError) as missing:
        client.job("no-such-job")
    assert missing.value.resource is not None
    assert missing.value.resource.name == "trainingJobs/no-such-job"
    with pytest.raises(NotFoundError):
        client.score_pairs(PLAIN_ROWS[:1], "models/no-such-model")
    with pytest.raises(ValueError, match="it must be sum, mean or as_trained"):
        client.score_pairs(PLAIN_ROWS[:1], "tiny", normalization="average")


def test_tokens_are_sent(start_server: StartServer, tmp_path: Path) -> None:
    words = ["tokens", "hash", "--owner", "team", "--roles", "score", "--generate"]
    made = subprocess.run(
        [os.environ["BRADLEY_TEST_BINARY"], *words], capture_output=True, text=True, check=True
    )
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(made.stdout)
    token = next(word for word in made.stderr.split() if word.startswith("brd_"))
    server = start_server("--auth", "tokens", "--token-file", str(tokens))
    with Client(server.target) as client, pytest.raises(UnauthenticatedError):
        client.models()
    with Client(server.target, token=lambda: token) as client:
        assert client.score_pairs(PLAIN_ROWS[:2], "tiny").results[0].HasField("score")
        with pytest.raises(PermissionDeniedError):
            client.upload(CHAT_ROWS)
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, fork) as executor:
        for given in (token, functools.partial(str, token)):
            scorer = Scorer(server.target, "tiny", token=given)
            rows = executor.submit(scorer.rows, PLAIN_ROWS[:2]).result(60)
            assert [row["error"] for row in rows] == [None, None]
        with pytest.raises(UnauthenticatedError):
            executor.submit(Scorer(server.target, "tiny").rows, PLAIN_ROWS[:2]).result(60)


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        Client("http://127.0.0.1:9", connect_timeout=0.5) as client,
        pytest.raises(UnavailableError, match=r"cannot reach 127\.0\.0\.1:9: .*bradley serve"),
    ):
        client.models()
    with pytest.raises(ValueError, match="write http://HOST:PORT"):
        Client("ftp://127.0.0.1:9")


def test_a_message_of_a_dataset_may_stand_for_its_name(client: Client, dataset: str) -> None:
    job = client.train(policy="tiny", dataset=dataset_pb2.Dataset(name=dataset), validate_only=True)
    assert job.dataset == dataset


def test_an_evaluation_reports_what_the_pairs_score(
    client: Client, policy: str, trained: training_pb2.TrainingJob
) -> None:
    rows = [{**row, "kind": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(PLAIN_ROWS)]
    uploaded = client.upload(rows)
    progress: list[int] = []
    report = client.evaluate(
        trained,
        uploaded,
        subset_column="kind",
        bins=5,
        on_progress=lambda p: progress.append(p.scored_pairs),
        beta=0.2,
    )
    scored = [r.score for r in client.score_pairs(rows, policy, beta=0.2).results]
    assert report.pairs == len(rows)
    assert report.policy_version == policy
    assert report.accuracy.share == sum(s.margin > 0 for s in scored) / len(rows)
    assert report.mean_margin == pytest.approx(sum(s.margin for s in scored) / len(rows))
    assert [(s.subset, s.accuracy.count) for s in report.subsets] == [("even", 20), ("odd", 20)]
    assert len(report.probability.bins) == 5
    assert progress == sorted(progress)
    assert all(count <= len(rows) for count in progress)
    with pytest.raises(NotFoundError):
        client.evaluate(trained, "none")
    with pytest.raises(InvalidArgumentError) as refused:
        client.evaluate(trained, uploaded, bins=1000)
    assert refused.value.violations[0].field == "bins"
    client.delete_dataset(uploaded)


def test_a_saved_calibration_is_in_the_scores(client: Client, server: Server, dataset: str) -> None:
    job = client.wait(client.train(JOB_FIELDS, dataset=dataset), timeout=120)
    scored = [r.score for r in client.score_pairs(PLAIN_ROWS, job).results]
    assert not any(s.HasField("calibrated_probability") for s in scored)
    # Every row is won, but for a quarter with the smallest margins, so that there is a temperature.
    small = sorted(abs(s.margin) for s in scored)[len(scored) // 4]
    rows = []
    for row, s in zip(PLAIN_ROWS, scored, strict=True):
        is_lost = abs(s.margin) < small
        swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        rows.append(swapped if (s.margin > 0) == is_lost else row)
    uploaded = client.upload(rows)
    report = client.evaluate(job, uploaded, save_calibration=True)
    assert report.calibration.saved, report.calibration.problem
    calibrated = [r.score for r in client.score_pairs(rows, job).results]
    assert all(s.HasField("calibrated_probability") for s in calibrated)
    with Scorer(server.target, job, output="all") as scorer:
        found = scorer.rows(rows)
    assert [row["calibrated_probability"] for row in found] == [
        s.calibrated_probability for s in calibrated
    ]
    client.delete_dataset(uploaded)
    client.delete_job(job)
