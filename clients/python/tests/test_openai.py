"""OpenAI's own client, against the OpenAI paths of a real server."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from conftest import Server
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from bradley.v1 import generation_pb2, generation_pb2_grpc, scoring_pb2

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def openai(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.target}/openai/v1", api_key="unused", max_retries=0)


def generated(server: Server, policy: str, seed: int, samples: int = 1) -> list[str]:
    """Returns the texts that GenerateCompletions gives the same prompt."""
    message = scoring_pb2.Message(role="user", content="Name a colour.")
    prompt = scoring_pb2.Text(chat=scoring_pb2.MessageList(messages=[message]))
    request = generation_pb2.GenerateCompletionsRequest(
        policy=policy, prompt=prompt, samples=samples, max_tokens=12, seed=seed
    )
    texts = [""] * samples
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for response in stub.GenerateCompletions(request):
            for delta in response.deltas:
                texts[delta.index] += delta.text
    return texts


def test_models_are_listed(openai: OpenAI) -> None:
    listed = list(openai.models.list())
    assert [model.id for model in listed] == ["tiny"]
    assert openai.models.retrieve("tiny").object == "model"
    with pytest.raises(NotFoundError, match="nothing"):
        openai.models.retrieve("nothing")


def test_a_chat_is_what_the_service_generates(openai: OpenAI, server: Server, policy: str) -> None:
    for model, name in (("tiny", "models/tiny"), (policy, policy)):
        answer = openai.chat.completions.create(
            model=model, messages=MESSAGES, n=2, max_completion_tokens=12, seed=5
        )
        texts = [choice.message.content for choice in answer.choices]
        assert texts == generated(server, name, seed=5, samples=2)
        assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
        assert answer.usage is not None
        assert 2 <= answer.usage.completion_tokens <= 24
        assert answer.usage.total_tokens > answer.usage.completion_tokens


def test_a_chat_is_streamed(openai: OpenAI, server: Server) -> None:
    with openai.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=12,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert [text] == generated(server, "models/tiny", seed=7)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None
    assert 1 <= chunks[-1].usage.completion_tokens <= 12


def test_a_text_is_continued(openai: OpenAI) -> None:
    whole = openai.completions.create(
        model="tiny", prompt="One two three", temperature=0.0, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    # OpenAI's default.
    assert whole.usage.completion_tokens == 16
    stream = openai.completions.create(
        model="tiny",
        prompt="One two three",
        temperature=0.0,
        extra_body={"ignore_eos": True},
        stream=True,
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole.choices[0].text


async def streamed(target: str) -> str:
    async with AsyncOpenAI(base_url=f"{target}/openai/v1", api_key="unused") as opened:
        stream = await opened.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, seed=7, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_the_asynchronous_client_gets_the_same(server: Server) -> None:
    import asyncio

    assert [asyncio.run(streamed(server.target))] == generated(server, "models/tiny", seed=7)


def test_errors_are_those_of_the_client(openai: OpenAI) -> None:
    # Typed loosely, because the client's types do not allow it.
    images: list[Any] = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(BadRequestError) as refused:
        openai.chat.completions.create(
            model="tiny", messages=MESSAGES, presence_penalty=0.5, logprobs=True, n=65
        )
    for part in ("presence_penalty is not supported", "logprobs is not supported"):
        assert part in refused.value.message
    with pytest.raises(BadRequestError, match="n is 65: at most 64 are allowed") as refused:
        openai.chat.completions.create(model="tiny", messages=MESSAGES, n=65)
    assert refused.value.param == "n"
    with pytest.raises(NotFoundError, match="nothing"):
        openai.chat.completions.create(model="nothing", messages=MESSAGES)
    with pytest.raises(NotFoundError, match="nothing"):
        openai.chat.completions.create(model="nothing", messages=MESSAGES, stream=True)
    with pytest.raises(BadRequestError, match=r"messages\[0\]"):
        openai.chat.completions.create(model="tiny", messages=images)
    with pytest.raises(APIStatusError) as unknown:
        openai.embeddings.create(model="tiny", input="x")
    assert unknown.value.status_code == 404
