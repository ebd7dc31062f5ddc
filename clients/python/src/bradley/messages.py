"""Builds protobuf messages from plain Python values: rows, scoring options and jobs."""

from __future__ import annotations

import datetime
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from bradley.v1 import generation_pb2, scoring_pb2, training_pb2

TextLike = str | Sequence[Mapping[str, Any]]
"""A prompt or an answer: a text, or a list of chat messages."""
PairLike = scoring_pb2.Pair | Mapping[str, Any]
"""A pair to score: a message, or a row with `prompt`, `chosen` and `rejected` (or `a` and `b`)."""

# Messages with arguments of the chat template.
_Templated = (
    scoring_pb2.Pair | scoring_pb2.ScoringOptions | generation_pb2.GenerateCompletionsRequest
)
# Messages of a job whose fields may be given without the message's name.
_JOB_SECTIONS = ("dpo", "optimizer", "lora", "batch", "run")


MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
"""Columns without which a row would mean something else."""
FURTHER_COLUMNS = ("system", "tools", "chat_template_kwargs", *MEDIA_COLUMNS)
"""Columns of a row besides the prompt and the answers."""
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns with the reference's log-probs of the chosen and of the rejected answer, as in TRL."""
POLICY_COLUMNS = ("chosen_logps", "rejected_logps")
"""The same for the policy."""


class RowError(ValueError):
    """A row has no pair that could be sent."""


def is_missing(value: Any) -> bool:
    """Returns true for None, NaN and pandas' NA."""
    if value is None:
        return True
    if isinstance(value, float):
        return value != value
    return type(value).__name__ in ("NAType", "NaTType")


def plain(value: Any) -> Any:
    """Converts arrays and scalars of numpy, and similar values, to lists and numbers of Python."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if hasattr(value, "as_py"):
        return plain(value.as_py())
    if is_missing(value):
        return None
    raise TypeError(f"{type(value).__name__} is no JSON value")


def without_nulls(value: Any) -> Any:
    """Removes null keys from objects at every depth.

    Typed tables fill absent keys with null. The server does the same with Parquet files.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def text_message(value: Any, column: str) -> scoring_pb2.Text:
    """Converts a text, or a list of chat messages."""
    if is_missing(value):
        raise RowError(f"{column}: is missing")
    if isinstance(value, str):
        return scoring_pb2.Text(plain=value)
    value = plain(value)
    if isinstance(value, list):
        messages = [_chat_message(m, f"{column}[{i}]") for i, m in enumerate(value)]
        return scoring_pb2.Text(chat=scoring_pb2.MessageList(messages=messages))
    raise RowError(f"{column}: is {type(value).__name__}; give a text or a list of messages")


def _chat_message(message: Any, place: str) -> scoring_pb2.Message:
    if not isinstance(message, dict):
        raise RowError(
            f"{place}: is {type(message).__name__}; give a message with role and content"
        )
    fields = {key: value for key, value in message.items() if value is not None}
    role, content = fields.get("role"), fields.get("content")
    if fields.keys() == {"role", "content"} and isinstance(role, str) and isinstance(content, str):
        return scoring_pb2.Message(role=role, content=content)
    # JSON preserves the order of keys, which templates print.
    return scoring_pb2.Message(fields_json=to_json(fields))


def to_json(value: Any) -> str:
    """Writes JSON that preserves the order of keys and the difference between 1.0 and 1."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def logged_columns(logged: str) -> tuple[str, ...]:
    """Returns the columns of log-probs that `logged` names: reference, both, or none if empty.

    Columns of the chosen answer and those of the rejected answer alternate.
    """
    columns: dict[str, tuple[str, ...]] = {
        "": (),
        "reference": REFERENCE_COLUMNS,
        "both": (*REFERENCE_COLUMNS, *POLICY_COLUMNS),
    }
    if logged not in columns:
        raise ValueError(f"logged is {logged!r}: it must be reference or both")
    return columns[logged]


def pair_message(row: PairLike, pair_id: str | None = None, logged: str = "") -> scoring_pb2.Pair:
    """Converts a row to a pair. Raises `RowError` if it has none.

    Reads fewer shapes of rows than `bradley score`, and these in the same way. Without `prompt`,
    the messages that both dialogues begin with are the prompt. The same holds if `prompt` is only
    the text of their first user message (UltraFeedback). A `system` column is the text of the
    system message. `logged` says which log-probs the row has, as for `logged_columns`; a message
    keeps its own.
    """
    if isinstance(row, scoring_pb2.Pair):
        pair = scoring_pb2.Pair()
        pair.CopyFrom(row)
        if pair_id is not None:
            pair.id = pair_id
        return pair
    a_name, b_name = ("a", "b") if "a" in row and "b" in row else ("chosen", "rejected")
    for name in (a_name, b_name):
        if is_missing(row.get(name)):
            raise RowError(f"{name}: is missing")
    try:
        _refuse_media(row)
        prompt, a, b = plain(row.get("prompt")), plain(row[a_name]), plain(row[b_name])
        if prompt is None or _is_first_user_text(prompt, a, b):
            prompt, a, b = _split_dialogues(a, b, f"{a_name} and {b_name}")
        prompt = _with_system(prompt, row.get("system"))
        for name, answer in ((a_name, a), (b_name, b)):
            _check_form(prompt, answer, name)
        pair = scoring_pb2.Pair(
            id=_id(row) if pair_id is None else pair_id,
            prompt=text_message(prompt, "prompt"),
            a=text_message(a, a_name),
            b=text_message(b, b_name),
        )
        kwargs = row.get("chat_template_kwargs")
        # Without a template there is nothing that variables could change.
        set_arguments(pair, row.get("tools"), None if isinstance(prompt, str) else kwargs)
        _set_logged(pair, row, logged)
    except RowError:
        raise
    except (TypeError, ValueError) as error:
        raise RowError(str(error)) from error
    return pair


def _set_logged(pair: scoring_pb2.Pair, row: Mapping[str, Any], logged: str) -> None:
    """Sets the log-probs of a row's columns. Answer a is the chosen one."""
    values = [_logged_sum(row, column) for column in logged_columns(logged)]
    if values:
        pair.logged.reference_a, pair.logged.reference_b = values[:2]
    if values[2:]:
        pair.logged.policy_a, pair.logged.policy_b = values[2:]


def _logged_sum(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if is_missing(value):
        raise RowError(
            f"{column}: is missing; add the log-prob of the answer, summed over its tokens"
        )
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(
            f"{column}: is {type(value).__name__}; give one number for the answer, the sum over "
            "its tokens (with several answers, a list with one number for each)"
        )
    if not -math.inf < value <= 0:
        raise RowError(f"{column}: is {value}; a log-prob is a finite number, at most 0")
    return float(value)


def pair_messages(row: Mapping[str, Any], first: int, logged: str = "") -> list[scoring_pb2.Pair]:
    """Converts a row whose answers may be lists to pairs, as the server does with rows of files.

    Each chosen answer makes a pair with each rejected one. The ids are numbers from `first`. Raises
    `RowError` if an answer has no pair. `logged` is that of `pair_message`.
    """
    answers = {name: _answers(row, name) for name in ("chosen", "rejected")}
    columns = logged_columns(logged)
    sums: dict[str, list[dict[str, Any]]] = {name: [{}] * len(answers[name]) for name in answers}
    if any(place != name for name, found in answers.items() for place, _ in found):
        sums["chosen"] = _logged_of_answers(row, columns[0::2], len(answers["chosen"]))
        sums["rejected"] = _logged_of_answers(row, columns[1::2], len(answers["rejected"]))
    pairs: list[scoring_pb2.Pair] = []
    for i, (chosen_place, chosen) in enumerate(answers["chosen"]):
        for j, (rejected_place, rejected) in enumerate(answers["rejected"]):
            of_pair = {**sums["chosen"][i], **sums["rejected"][j]}
            named = {**row, "chosen": chosen, "rejected": rejected, **of_pair}
            try:
                pairs.append(pair_message(named, str(first + len(pairs)), logged))
            except RowError as error:
                column, separator, rest = str(error).partition(":")
                places = {"chosen": chosen_place, "rejected": rejected_place}
                raise RowError(f"{places.get(column, column)}{separator}{rest}") from error
    return pairs


def _logged_of_answers(
    row: Mapping[str, Any], columns: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """Returns the log-probs of each of `count` answers. Their columns have a list with a number for
    each; for a single answer also a number, which stays in the row."""
    of_answers: list[dict[str, Any]] = [{} for _ in range(count)]
    for column in columns:
        value = row.get(column)
        if is_missing(value):
            continue
        try:
            value = plain(value)
        except TypeError as error:
            raise RowError(f"{column}: {error}") from error
        if isinstance(value, list) and len(value) == count:
            for of_answer, one in zip(of_answers, value, strict=True):
                of_answer[column] = one
        elif count > 1:
            raise RowError(f"{column}: give a list with one number for each of the {count} answers")
    return of_answers


def _answers(row: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """Returns the answers of a column with their places: a list of texts or of dialogues has
    several, and a list of messages is one."""
    value = row.get(name)
    if is_missing(value) or isinstance(value, str):
        return [(name, value)]
    try:
        value = plain(value)
    except TypeError as error:
        raise RowError(f"{name}: {error}") from error
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        return [(name, value)]
    kind = str if isinstance(value[0], str) else list
    if not all(isinstance(answer, kind) for answer in value):
        raise RowError(f"{name}: mixes texts and lists of messages; use one form for all answers")
    return [(f"{name}[{i}]", answer) for i, answer in enumerate(value)]


def _id(row: Mapping[str, Any]) -> str:
    given = row.get("id")
    return "" if is_missing(given) else str(given)


def _refuse_media(row: Mapping[str, Any]) -> None:
    for name in MEDIA_COLUMNS:
        value: Any = row.get(name)
        if not is_missing(value) and not (hasattr(value, "__len__") and len(value) == 0):
            raise RowError(f"{name}: cannot be used, because models here see text only")


def _is_first_user_text(prompt: Any, *dialogues: Any) -> bool:
    for dialogue in dialogues:
        if not (isinstance(dialogue, list) and all(isinstance(m, dict) for m in dialogue)):
            return False
        said = [message.get("content") for message in dialogue if message.get("role") == "user"]
        if not said or said[0] != prompt:
            return False
    return True


def _split_dialogues(a: Any, b: Any, names: str) -> tuple[Any, Any, Any]:
    if not (isinstance(a, list) and isinstance(b, list)):
        raise RowError("prompt: is missing")
    same = 0
    while same < min(len(a), len(b)) - 1 and a[same] == b[same]:
        same += 1
    if same == 0:
        raise RowError(f"prompt: is missing, and {names} do not begin with the same messages")
    return a[:same], a[same:], b[same:]


def _with_system(prompt: Any, system: Any) -> Any:
    if is_missing(system) or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise RowError(f"system: is {type(system).__name__}; give the text of the system message")
    if not isinstance(prompt, list):
        raise RowError("system: needs a dialogue; make the prompt a list of messages")
    message = {"role": "system", "content": system}
    if prompt and prompt[0] == message:
        return prompt
    if prompt and isinstance(prompt[0], dict) and prompt[0].get("role") == "system":
        raise RowError("system: differs from the system message of the prompt")
    return [message, *prompt]


def _check_form(prompt: Any, answer: Any, name: str) -> None:
    if isinstance(prompt, str) is not isinstance(answer, str):
        raise RowError(f"{name}: give texts or lists of messages for both the prompt and {name}")


def set_arguments(target: _Templated, tools: Any, kwargs: Any) -> None:
    """Sets tools and template variables, given as values or as JSON."""
    if not is_missing(tools):
        target.tools_json = tools if isinstance(tools, str) else to_json(plain(tools))
    if not is_missing(kwargs):
        text = kwargs if isinstance(kwargs, str) else to_json(plain(kwargs))
        target.chat_template_kwargs_json = "" if text == "{}" else text


def completions_request(
    options: scoring_pb2.ScoringOptions, row: Mapping[str, Any]
) -> scoring_pb2.ScoreCompletionsRequest:
    """Builds the request for a row with `prompt` and `completions`.

    Raises `RowError` if it cannot be built.
    """
    for name in ("prompt", "completions"):
        if is_missing(row.get(name)):
            raise RowError(f"{name}: is missing")
    own = scoring_pb2.ScoringOptions()
    own.CopyFrom(options)
    try:
        _refuse_media(row)
        answers = plain(row["completions"])
        if not isinstance(answers, list):
            raise RowError("completions: give a list of answers")
        prompt = _with_system(plain(row["prompt"]), row.get("system"))
        for i, answer in enumerate(answers):
            _check_form(prompt, answer, f"completions[{i}]")
        # The answers of a request have no arguments of their own.
        kwargs = row.get("chat_template_kwargs")
        set_arguments(own, row.get("tools"), None if isinstance(prompt, str) else kwargs)
        return scoring_pb2.ScoreCompletionsRequest(
            options=own,
            prompt=text_message(prompt, "prompt"),
            completions=[text_message(c, f"completions[{i}]") for i, c in enumerate(answers)],
        )
    except RowError:
        raise
    except (TypeError, ValueError) as error:
        raise RowError(str(error)) from error


def scoring_options(
    policy: str,
    *,
    reference: str = "",
    beta: float | None = None,
    max_length: int | None = None,
    normalization: str = "",
    per_token_logprobs: bool = False,
    tools: Any = None,
    chat_template_kwargs: Any = None,
) -> scoring_pb2.ScoringOptions:
    """Builds the options of scoring calls. `normalization` is sum, mean or as_trained."""
    names = {
        name.removeprefix("REWARD_NORMALIZATION_").lower(): number
        for name, number in scoring_pb2.RewardNormalization.items()
    }
    if normalization and normalization not in names:
        raise ValueError(f"normalization is {normalization!r}: it must be sum, mean or as_trained")
    options = scoring_pb2.ScoringOptions(
        policy=policy,
        reference=reference,
        beta=beta,
        max_length=max_length,
        per_token_logprobs=per_token_logprobs,
        normalization=names[normalization or "unspecified"],
    )
    set_arguments(options, tools, chat_template_kwargs)
    return options


JobLike = training_pb2.TrainingJob | Mapping[str, Any]
"""A job: a message, or its fields by name."""


def job_message(job: JobLike | None, fields: Mapping[str, Any]) -> training_pb2.TrainingJob:
    """Builds a job from a message or a dict, and further fields.

    Fields of the messages dpo, optimizer, lora, batch and run may be given without the message's
    name: `beta=0.1` is `dpo={"beta": 0.1}`. Raises `ValueError` for an unknown field.
    """
    message = training_pb2.TrainingJob()
    if isinstance(job, training_pb2.TrainingJob):
        message.CopyFrom(job)
        given: dict[str, Any] = {}
    else:
        given = {**job} if job is not None else {}
    for name, value in fields.items():
        if isinstance(given.get(name), Mapping) and isinstance(value, Mapping):
            value = {**given[name], **value}
        given[name] = value
    tree: dict[str, Any] = {}
    # Whole messages first, so that single fields are added to them.
    for name in sorted(given, key=lambda name: name not in message.DESCRIPTOR.fields_by_name):
        if name in message.DESCRIPTOR.fields_by_name:
            tree[name] = _job_value(given[name])
        else:
            section = _section_of(message.DESCRIPTOR, name)
            tree[section] = {**tree.get(section, {}), name: _job_value(given[name])}
    try:
        json_format.ParseDict(tree, message)
    except json_format.ParseError as error:
        raise ValueError(f"the job cannot be built: {error}") from error
    return message


def _job_value(value: Any) -> Any:
    if isinstance(value, datetime.timedelta):
        return f"{value.total_seconds():.6f}s"
    return plain(value)


def _section_of(job: Descriptor, name: str) -> str:
    sections = [s for s in _JOB_SECTIONS if name in _fields_of(job.fields_by_name[s])]
    if len(sections) == 1:
        return sections[0]
    known = [
        *job.fields_by_name,
        *(n for s in _JOB_SECTIONS for n in _fields_of(job.fields_by_name[s])),
    ]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; {near[0]} is one" if near else ""
    raise ValueError(f"{name} is no field of a job{hint}")


def _fields_of(section: FieldDescriptor) -> Iterable[str]:
    message = section.message_type
    return list(message.fields_by_name) if message is not None else []


def full_name(collection: str, name: str) -> str:
    """Returns `{collection}/{name}`, or the name unchanged if it already has this prefix."""
    return name if name.startswith(f"{collection}/") else f"{collection}/{name}"


def name_of(resource: Any, collection: str) -> str:
    """Returns the full name of a resource, given as a message or as a name."""
    return full_name(collection, resource if isinstance(resource, str) else str(resource.name))


def chunks_of(
    pairs: Sequence[scoring_pb2.Pair], max_pairs: int, max_bytes: int
) -> Iterable[Sequence[scoring_pb2.Pair]]:
    """Divides pairs into calls of at most `max_pairs` pairs and about `max_bytes` bytes."""
    start, size = 0, 0
    for i, pair in enumerate(pairs):
        added = pair.ByteSize() + 8
        if i > start and (i - start >= max_pairs or size + added > max_bytes):
            yield pairs[start:i]
            start, size = i, 0
        size += added
    if start < len(pairs):
        yield pairs[start:]
