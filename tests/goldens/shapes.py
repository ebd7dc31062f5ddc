"""Writes `shapes.json`: what TRL makes of preference rows whose answers begin with the prompt."""

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trl.data_utils import extract_prompt, maybe_extract_prompt

TEXTS = [
    ("The sky is blue.", "The sky is green."),
    ("The sky is  blue.", "The sky is  green."),
    ("The sky is", "The sky is blue."),
    ("The sky is blue.", "The sky is "),
    ("The same", "The same"),
    ("2+2=4", "2+2=5"),
    ("Q: why?\nA: because", "Q: why?\nA: no idea"),
    ("Q\tone", "Q\ttwo"),
    ("naïve café", "naïve caffè"),
    ("Was heißt 猫? Katze", "Was heißt 猫? Hund"),
    ("😀 😁 yes", "😀 😁 no"),
    ("😀😁", "😀😂"),
    ("e\u0301a", "e\u0300a"),
    ("a", "b"),
    (" a", " b"),
    ("x ", "y "),
    ("a ", "a"),
    ("Human: hi Assistant: a", "Human: hi Assistant: b"),
]

DIALOGUES = [
    {
        "prompt": "What color is the sky?",
        "chosen": [
            {"role": "user", "content": "What color is the sky?"},
            {"role": "assistant", "content": "It is blue."},
        ],
        "rejected": [
            {"role": "user", "content": "What color is the sky?"},
            {"role": "assistant", "content": "It is green."},
        ],
    },
    {
        "prompt": "And now?",
        "chosen": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Go on."},
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "So."},
        ],
        "rejected": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Go on."},
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "I do not know."},
        ],
    },
]


def random_texts(draw):
    """Two texts with a common beginning."""
    def text(most):
        return "".join(draw.choice("ab  \né😀") for _ in range(draw.randint(0, most)))

    start = text(6)
    return start + text(4), start + text(4)


def main():
    draw = random.Random(1)
    texts = TEXTS + [pair for pair in (random_texts(draw) for _ in range(200)) if all(pair)]
    texts = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    golden = {
        "texts": [{"row": row, "split": extract_prompt(row)} for row in texts],
        "dialogues": [{"row": row, "split": maybe_extract_prompt(row)} for row in DIALOGUES],
    }
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]" for name, cases in golden.items()]
    (Path(__file__).parent / "shapes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
