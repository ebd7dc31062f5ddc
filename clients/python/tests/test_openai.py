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


def test_a_text_has_its_log_probs(openai: OpenAI, server: Server) -> None:
    answer = openai.completions.create(
        model="tiny", prompt="One two three", temperature=0.0, max_tokens=6, logprobs=2
    )
    choice = answer.choices[0]
    log_probs = choice.logprobs
    assert log_probs is not None
    assert answer.usage is not None
    assert log_probs.tokens is not None
    assert log_probs.token_logprobs is not None
    assert log_probs.top_logprobs is not None
    assert len(log_probs.tokens) == answer.usage.completion_tokens
    for token, own, top in zip(
        log_probs.tokens, log_probs.token_logprobs, log_probs.top_logprobs, strict=True
    ):
        assert own == max(top.values()), token
    prompt = scoring_pb2.Text(plain="One two three")
    request = generation_pb2.GenerateCompletionsRequest(
        policy="models/tiny", prompt=prompt, temperature=0.0, max_tokens=6, logprobs=True
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        deltas = [delta for part in stub.GenerateCompletions(request) for delta in part.deltas]
    assert log_probs.token_logprobs == [p for delta in deltas for p in delta.token_logprobs]
    stream = openai.completions.create(
        model="tiny", prompt="One two three", temperature=0.0, max_tokens=6, logprobs=2, stream=True
    )
    tokens: list[str] = []
    for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        tokens += logprobs.tokens or [] if logprobs else []
    assert tokens == log_probs.tokens


def log_likelihoods(choices: Any, contexts: list[int]) -> list[tuple[float, bool]]:
    """Reads log-likelihoods as lm-evaluation-harness does (LocalCompletionsAPI.parse_logprobs)."""
    read: list[tuple[float, bool]] = []
    for choice, context in zip(sorted(choices, key=lambda c: c.index), contexts, strict=True):
        own = choice.logprobs.token_logprobs[context:-1]
        top = choice.logprobs.top_logprobs[context:-1]
        is_greedy = all(p == max(others.values()) for p, others in zip(own, top, strict=True))
        read.append((sum(own), is_greedy))
    return read


def test_log_likelihoods_of_several_prompts(openai: OpenAI) -> None:
    def score(prompts: list[list[int]]) -> Any:
        return openai.completions.create(
            model="tiny",
            prompt=prompts,
            temperature=0.0,
            max_tokens=1,
            logprobs=1,
            seed=1234,
            echo=True,
        ).choices

    prompts = [[5, 6, 7, 8], [5, 6, 9], [11, 12, 13, 14, 15]]
    contexts = [2, 2, 1]
    found = log_likelihoods(score(prompts), contexts)
    assert len(found) == 3
    assert all(total < 0 for total, _ in found)
    for i, prompt in enumerate(prompts):
        assert log_likelihoods(score([prompt]), contexts[i : i + 1]) == found[i : i + 1]
    # The token that the model makes itself is the greedy one.
    made = score([[5, 6]])[0].logprobs.top_logprobs[-1]
    best = max(made.values())
    candidates = log_likelihoods(score([[5, 6, token] for token in range(3, 99)]), [2] * 96)
    for total, is_greedy in candidates:
        assert is_greedy == (abs(total - best) < 1e-5)


def test_a_prompt_is_repeated(openai: OpenAI) -> None:
    for max_tokens in (0, 3):
        answer = openai.completions.create(
            model="tiny", prompt="One two three", max_tokens=max_tokens, echo=True, seed=5
        )
        assert answer.choices[0].text.startswith("One two three")
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= max_tokens


def test_a_chat_has_its_log_probs(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=6,
        temperature=0.0,
        logprobs=True,
        top_logprobs=3,
    )
    log_probs = answer.choices[0].logprobs
    assert log_probs is not None
    assert log_probs.content
    for token in log_probs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob


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
            model="tiny", messages=MESSAGES, presence_penalty=0.5, top_logprobs=2, n=65
        )
    for part in ("presence_penalty is not supported", "top_logprobs has no meaning"):
        assert part in refused.value.message
    with pytest.raises(BadRequestError, match="n is 65: at most 64 are allowed") as refused:
        openai.chat.completions.create(model="tiny", messages=MESSAGES, n=65)
    assert refused.value.param == "n"
    for limit in ("max_tokens", "max_completion_tokens"):
        limits: dict[str, Any] = {limit: 1_000_000}
        expected = f"{limit} is too large: .*: lower {limit}, or"
        with pytest.raises(BadRequestError, match=expected) as refused:
            openai.chat.completions.create(model="tiny", messages=MESSAGES, **limits)
        assert refused.value.param == limit
    with pytest.raises(NotFoundError, match="nothing"):
        openai.chat.completions.create(model="nothing", messages=MESSAGES)
    with pytest.raises(NotFoundError, match="nothing"):
        openai.chat.completions.create(model="nothing", messages=MESSAGES, stream=True)
    with pytest.raises(BadRequestError, match=r"messages\[0\]"):
        openai.chat.completions.create(model="tiny", messages=images)
    with pytest.raises(APIStatusError) as unknown:
        openai.embeddings.create(model="tiny", input="x")
    assert unknown.value.status_code == 404
