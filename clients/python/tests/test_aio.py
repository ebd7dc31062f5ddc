"""The asynchronous client against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_ROWS, JOB_FIELDS, PLAIN_ROWS, ROWS, Server, StartServer

from bradley import AsyncClient, Client, Completions, InvalidArgumentError, UnavailableError
from bradley.v1 import scoring_pb2, training_pb2


def test_a_cycle(server: Server, tmp_path: Path) -> None:
    async def cycle() -> None:
        async with AsyncClient(server.target) as client:
            assert [m.name for m in await client.models()] == ["models/tiny"]
            dataset = await client.upload(CHAT_ROWS, model="tiny")
            assert dataset.report.valid_rows == len(CHAT_ROWS)
            assert dataset.name in [d.name async for d in client.datasets()]
            assert await client.dataset(dataset.name) == dataset
            job = await client.train(JOB_FIELDS, dataset=dataset, max_steps=20)
            cursor, seen = 0, []
            # Leaves the stream after each event, as often as there are events.
            while True:
                async for event in client.watch(job, after=cursor):
                    cursor = event.sequence
                    seen.append(event)
                    break
                else:
                    break
            assert seen == [event async for event in client.events(job)]
            ended = await client.wait(job, timeout=60)
            assert ended.state == training_pb2.JOB_STATE_SUCCEEDED
            assert job.name in [j.name async for j in client.jobs("succeeded")]
            changed = await client.update(job, display_name="renamed")
            assert changed.display_name == "renamed"
            [checkpoint] = await client.checkpoints(job)
            assert await client.checkpoint(checkpoint.name) == checkpoint
            paths = await client.download(job, tmp_path)
            assert (tmp_path / "adapter_model.safetensors") in paths
            whole = await client.score_pairs(ROWS, job)
            streamed = {
                answer.result.id: answer.result.score
                async for answer in client.stream_scores(ROWS, job)
            }
            for row, result in zip(ROWS, whole.results, strict=True):
                assert streamed[row["id"]] == result.score
                answers = [row["chosen"], row["rejected"]]
                scored = await client.score_completions(row["prompt"], answers, job)
                assert [r.score for r in scored.results] == [result.score.a, result.score.b]
            seen_pairs: list[int] = []
            report = await client.evaluate(
                job, dataset, on_progress=lambda p: seen_pairs.append(p.total_pairs)
            )
            of_dataset = await client.score_pairs(CHAT_ROWS, job)
            assert report.pairs == len(CHAT_ROWS)
            assert report.accuracy.share == sum(
                result.score.margin > 0 for result in of_dataset.results
            ) / len(CHAT_ROWS)
            assert set(seen_pairs) <= {len(CHAT_ROWS)}
            with pytest.raises(InvalidArgumentError):
                await client.evaluate(job, dataset, bins=1000)
            assert (await client.estimate(job)).train_pairs == len(CHAT_ROWS)
            with pytest.raises(InvalidArgumentError) as refused:
                await client.train(policy="tiny", dataset=dataset, beta=-1.0)
            assert refused.value.violations[0].field == "training_job.dpo.beta"
            await client.delete_job(job)
            await client.delete_dataset(dataset)

    asyncio.run(asyncio.wait_for(cycle(), 120))


def test_an_upload_whose_rows_fail_stores_nothing(server: Server) -> None:
    def rows() -> Any:
        yield CHAT_ROWS[0]
        raise OSError("the disk is gone")

    async def upload() -> None:
        async with AsyncClient(server.target) as client:
            before = [d.name async for d in client.datasets()]
            with pytest.raises(OSError, match="the disk is gone"):
                await client.upload(rows())
            assert [d.name async for d in client.datasets()] == before

    asyncio.run(asyncio.wait_for(upload(), 60))


def test_a_stream_survives_the_restart_of_the_server(
    start_server: StartServer, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    server = start_server(data=data)

    async def score() -> list[scoring_pb2.StreamScorePairsResponse]:
        killed = asyncio.Event()

        async def rows() -> AsyncIterator[dict[str, str]]:
            for i, row in enumerate(PLAIN_ROWS):
                if i == 30:
                    await killed.wait()
                yield row

        async with AsyncClient(server.target) as client:
            answers = []
            async for answer in client.stream_scores(rows(), "tiny"):
                answers.append(answer)
                if len(answers) == 10:
                    server.stop()
                    await asyncio.to_thread(start_server, data=data, listen=server.address)
                    killed.set()
            return answers

    answers = asyncio.run(asyncio.wait_for(score(), 120))
    assert sorted(int(a.result.id) for a in answers) == list(range(len(PLAIN_ROWS)))
    with Client(server.target) as client:
        results = client.score_pairs(PLAIN_ROWS, "tiny").results
    for answer in answers:
        assert answer.result.score == results[int(answer.result.id)].score


def test_samples_are_generated_and_streamed(server: Server) -> None:
    question = [{"role": "user", "content": "Name a colour."}]
    settings: dict[str, Any] = {"samples": 2, "max_tokens": 12, "seed": 7, "logprobs": True}

    async def generate() -> Completions:
        async with AsyncClient(server.target) as client:
            whole = await client.generate(question, "tiny", **settings)
            texts = [""] * 2
            async for delta in client.stream_completions(question, "tiny", **settings):
                texts[delta.index] += delta.text
            assert texts == [sample.text for sample in whole.samples]
            with pytest.raises(InvalidArgumentError) as refused:
                await client.generate("x", "tiny", samples=65)
            assert refused.value.violations[0].field == "samples"
            return whole

    whole = asyncio.run(asyncio.wait_for(generate(), 60))
    with Client(server.target) as client:
        assert client.generate(question, "tiny", **settings) == whole


def test_a_row_that_fails_ends_a_stream(server: Server) -> None:
    async def score() -> None:
        async with AsyncClient(server.target) as client:
            with pytest.raises(ValueError, match=r"pairs\[1\]: chosen: is missing"):
                async for _ in client.stream_scores([PLAIN_ROWS[0], {"prompt": "x"}], "tiny"):
                    pass

    asyncio.run(asyncio.wait_for(score(), 60))


def test_a_server_that_is_not_there_is_named() -> None:
    async def call() -> None:
        async with AsyncClient("http://127.0.0.1:9", connect_timeout=0.5) as client:
            with pytest.raises(UnavailableError, match=r"cannot reach 127\.0\.0\.1:9"):
                await client.models()

    asyncio.run(asyncio.wait_for(call(), 60))
