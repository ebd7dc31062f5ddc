"""Generation: its requests, and the samples of a policy."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from bradley import messages
from bradley.calls import PolicyLike, policy_name
from bradley.errors import protocol_error
from bradley.v1 import generation_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_UNSPECIFIED: "",
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


class SamplingArguments(TypedDict, total=False):
    """Options of generation, as in the message GenerateCompletionsRequest."""

    samples: int
    """Number of samples, at most 64. Default: 1."""
    max_tokens: int
    """Maximum number of tokens of each sample. Default: 256."""
    temperature: float
    """0.0001 to 100; 0 always chooses the most likely token. Default: 1."""
    top_p: float
    """Sample from the most likely tokens whose probabilities add up to this. With `top_k`, it is a
    share of the probability of those tokens. Default: 1."""
    top_k: int
    """Sample from this many of the most likely tokens. Default: all."""
    seed: int
    """Seed of the random numbers, 0 to 2⁶⁴ − 1. Default: a random one, which the result has."""
    stop: str | Sequence[str]
    """Texts that end a sample, at most 16. The text of the sample ends before them."""
    stop_token_ids: Sequence[int]
    """Tokens that end a sample besides the model's end-of-sequence tokens, at most 64."""
    ignore_eos: bool
    """Continue after the model's end-of-sequence tokens."""
    logprobs: bool
    """Return the log-prob of every token, too."""
    tools: Any
    """Tools that the model may call, as a list or as JSON. Only for chat messages."""
    chat_template_kwargs: Any
    """Variables of the chat template, as a dict or as JSON."""


@dataclass(frozen=True)
class Completion:
    """A sample: one continuation of a prompt."""

    text: str
    """The text, without special tokens."""
    finish_reason: str
    """The reason why it has no further tokens: stop (a token or a text that ends it), length
    (`max_tokens`), or other for a reason that only newer servers have."""
    token_ids: tuple[int, ...]
    """The tokens, the one that ended the sample included."""
    token_logprobs: tuple[float, ...]
    """The log-prob of each token in nats, at temperature 1 and over the whole vocabulary. Empty
    unless `logprobs` was given."""

    @property
    def logprob(self) -> float | None:
        """The log-prob of all tokens together; `None` unless `logprobs` was given."""
        return sum(self.token_logprobs) if self.token_logprobs else None


@dataclass(frozen=True)
class Completions:
    """The samples of a prompt."""

    samples: tuple[Completion, ...]
    policy_version: str
    """Name of the weights. For a running job's current weights `@` and their step are appended."""
    seed: int
    """With this seed, the same call gives the same samples."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    completion_tokens: int
    """Number of tokens of all samples."""

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.samples[0].text


@dataclass(frozen=True)
class CompletionDelta:
    """New tokens of a sample. The other fields are those of `Completion` and `Completions`."""

    index: int
    """Number of the sample, from 0."""
    text: str
    """New text. It may lag behind the tokens: until a character is complete, or while it may be the
    beginning of a stop text."""
    finish_reason: str
    """Empty until the sample's last token."""
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    policy_version: str
    seed: int


class GenerationRun:
    """Takes the responses of a generation stream."""

    def __init__(self, request: generation_pb2.GenerateCompletionsRequest) -> None:
        self._samples: list[list[CompletionDelta]] = [[] for _ in range(request.samples)]
        self._last = generation_pb2.GenerateCompletionsResponse()

    @property
    def has_begun(self) -> bool:
        """True if there is a part of a sample."""
        return any(self._samples)

    def take(self, response: generation_pb2.GenerateCompletionsResponse) -> list[CompletionDelta]:
        """Takes the next response and returns its parts of samples."""
        self._last = response
        deltas = [_delta(part, response) for part in response.deltas]
        for delta in deltas:
            if delta.index >= len(self._samples):
                raise protocol_error(f"the server sent more than {len(self._samples)} samples")
            self._samples[delta.index].append(delta)
        return deltas

    def completions(self) -> Completions:
        """Returns all samples. Raises an error if the stream ended before they did."""
        is_complete = all(deltas and deltas[-1].finish_reason for deltas in self._samples)
        if not (is_complete and self._last.HasField("usage")):
            raise protocol_error("the stream ended before all samples were complete")
        return Completions(
            samples=tuple(_joined(deltas) for deltas in self._samples),
            policy_version=self._last.policy_version,
            seed=self._last.seed,
            prompt_tokens=self._last.usage.prompt_tokens,
            completion_tokens=self._last.usage.completion_tokens,
        )


def request(
    prompt: messages.TextLike, policy: PolicyLike, arguments: SamplingArguments
) -> generation_pb2.GenerateCompletionsRequest:
    """Builds the request for a prompt. It has a seed, so that it can be repeated."""
    given: dict[str, Any] = {**arguments}
    return _request(prompt, policy_name(policy), **given)


def _request(
    prompt: messages.TextLike,
    policy: str,
    *,
    samples: int = 1,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: bool = False,
    tools: Any = None,
    chat_template_kwargs: Any = None,
) -> generation_pb2.GenerateCompletionsRequest:
    # To the server, 0 is the default.
    for name, number in (("samples", samples), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: it must be at least 1")
    message = generation_pb2.GenerateCompletionsRequest(
        policy=policy,
        prompt=messages.text_message(prompt, "prompt"),
        samples=samples,
        max_tokens=max_tokens or 0,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=secrets.randbits(64) if seed is None else seed,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    messages.set_arguments(message, tools, chat_template_kwargs)
    return message


def _delta(
    part: generation_pb2.CompletionDelta, response: generation_pb2.GenerateCompletionsResponse
) -> CompletionDelta:
    return CompletionDelta(
        index=part.index,
        text=part.text,
        finish_reason=_FINISH_REASONS.get(part.finish_reason, "other"),
        token_ids=tuple(part.token_ids),
        token_logprobs=tuple(part.token_logprobs),
        policy_version=response.policy_version,
        seed=response.seed,
    )


def _joined(deltas: Sequence[CompletionDelta]) -> Completion:
    return Completion(
        text="".join(delta.text for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        token_logprobs=tuple(logprob for delta in deltas for logprob in delta.token_logprobs),
    )
