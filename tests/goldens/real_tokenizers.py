"""Writes what transformers makes of dialogues.json with real tokenizers and with TRL's chat templates, and what TRL makes of rows.

    real_tokenizers.py TOKENIZERS OUT

TOKENIZERS is the folder that .ci/tokenizers fills. OUT gets a folder for each tokenizer, with a chat template where the package has none, and
expected.json, which tests/it/tokenizers.rs compares with.
"""

import datetime
import hashlib
import importlib.util
import json
import pathlib
import sys
import types

import transformers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils
from trl import DPOTrainer

HERE = pathlib.Path(__file__).parent
TEMPLATES = pathlib.Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
# The packages of these tokenizers have no chat template.
MISSING_TEMPLATES = {"llama2": HERE / "llama2.jinja", "gptoss": TEMPLATES / "gptoss.jinja"}
# What strftime_now prints.
NOW = datetime.datetime(2026, 7, 4)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def variants(dialogue):
    """Yields every set of template arguments of a dialogue, with and without the generation prompt."""
    for kwargs in [{}, *dialogue.get("kwargs", [])]:
        for add_generation_prompt in (False, True):
            yield kwargs, add_generation_prompt


def chats(tokenizer, corpus, chat_template=None, tokenize=True):
    results = []
    for index, dialogue in enumerate(corpus["dialogues"]):
        tools = dialogue.get("tools")
        tools = corpus["tools"][tools] if isinstance(tools, str) else tools
        for kwargs, add_generation_prompt in variants(dialogue):
            result = {"dialogue": index, "kwargs": kwargs, "add_generation_prompt": add_generation_prompt}
            options = dict(tools=tools, chat_template=chat_template, add_generation_prompt=add_generation_prompt, **kwargs)
            try:
                result["text"] = tokenizer.apply_chat_template(dialogue["messages"], tokenize=False, **options)
                if tokenize:
                    # As TRL does: rendered and tokenised in one call.
                    result["ids"] = tokenizer.apply_chat_template(dialogue["messages"], **options)["input_ids"]
            except Exception as e:
                result["error"] = f"{type(e).__name__}: {e}"
            results.append(result)
    return results


ROWS = ["pairs.jsonl", "plain.jsonl", "tools_pairs.jsonl"]


class Rows(list):
    """Rows with the interface of a dataset. `datasets` would give each message the keys of all others, with the value None."""

    def map(self, function, fn_kwargs={}):
        return Rows({**row, **function(dict(row), **fn_kwargs)} for row in self)


def tokens_of_rows(tokenizer, file):
    """Returns what DPOTrainer makes of each row of a file."""
    trainer, args = types.SimpleNamespace(_tokenizer=tokenizer), types.SimpleNamespace(dataset_num_proc=None, max_length=None)
    results = []
    for line in (HERE / file).read_text().splitlines():
        try:
            (row,) = DPOTrainer._prepare_dataset(trainer, Rows([json.loads(line)]), tokenizer, args, file)
            results.append({part: row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")})
        except Exception as e:
            results.append({"error": f"{type(e).__name__}: {e}"})
    return results


def single_tokens(tokenizer, name):
    """Decodes about 2,000 ids, always the same ones, and every added token, each alone."""
    ids = range(len(tokenizer))
    step = max(1, len(ids) // 2000)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % step
    chosen = set(ids[start::step]) | set(tokenizer.added_tokens_decoder)
    return [{"ids": [i], "text": tokenizer.decode([i], skip_special_tokens=False)} for i in sorted(chosen)]


def main(tokenizers, out):
    chat_template_utils.datetime = Clock
    corpus = json.loads((HERE / "dialogues.json").read_text())
    expected = {"transformers": transformers.__version__, "date": NOW.date().isoformat(), "tokenizers": {}, "templates": {}}
    for source in sorted(p for p in tokenizers.iterdir() if (p / "tokenizer.json").exists()):
        folder = out / source.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        if source.name in MISSING_TEMPLATES:
            (folder / "chat_template.jinja").symlink_to(MISSING_TEMPLATES[source.name].resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [
            {"text": text, "add_special_tokens": special, "ids": tokenizer(text, add_special_tokens=special)["input_ids"]}
            for text in corpus["texts"]
            for special in (True, False)
        ]
        rendered = chats(tokenizer, corpus)
        decoded = [{"ids": e["ids"], "text": tokenizer.decode(e["ids"], skip_special_tokens=False)} for e in [*encoded, *rendered] if "ids" in e]
        expected["tokenizers"][source.name] = {
            "class": type(tokenizer).__name__,
            "encoded": encoded,
            "chats": rendered,
            "rows": {file: tokens_of_rows(tokenizer, file) for file in ROWS},
            "decoded": decoded + single_tokens(tokenizer, source.name),
        }
    # Any tokenizer will do: the templates see only its special tokens.
    tokenizer = AutoTokenizer.from_pretrained(out / "llama2")
    expected["special_tokens"] = tokenizer.special_tokens_map
    for template in sorted(TEMPLATES.glob("*.jinja")):
        source = template.read_text()
        expected["templates"][template.stem] = {"source": source, "chats": chats(tokenizer, corpus, source, tokenize=False)}
    (out / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
