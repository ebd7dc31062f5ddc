"""Runs lm-evaluation-harness against a server and with its own backend, and compares every item.

Usage: python harness.py BASE_URL MODEL_NAME MODEL_DIR WORK_DIR [FURTHER_ARGUMENTS]

BASE_URL is that of OpenAI's paths, MODEL_DIR the model that the server has under MODEL_NAME, and
FURTHER_ARGUMENTS arguments of `local-completions`. The task has multiple-choice questions, whose
answers the model ranks by their log-likelihoods. Nothing is fetched from the network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

base_url, model_name, model_dir, work_dir, *further = sys.argv[1:]
work = Path(work_dir)
tasks = work / "tasks"
tasks.mkdir(parents=True)
TASK = "local_questions"
THINGS = ["bread", "a bicycle", "glass", "the tide", "a song"]
QUESTIONS = ["What is {} made of?", "Who needs {}?", "Where does {} come from?", "Why {}?"]
ANSWERS = [
    "Nobody knows it.",
    "It is an old question about {}, and the answer depends on whom you ask.",
    "Water, flour and salt: more is not needed for {}.",
]
RELATIVE = 1e-4

rows = [
    {
        "question": question.format(thing),
        "answers": [answer.format(thing) for answer in ANSWERS],
        "label": (i + j) % len(ANSWERS),
    }
    for i, thing in enumerate(THINGS)
    for j, question in enumerate(QUESTIONS)
]
data = work / "rows.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))
# JSON is YAML, too.
task = {
    "task": TASK,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{answers}}",
    "doc_to_target": "{{label}}",
    "target_delimiter": " ",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}
(tasks / f"{TASK}.yaml").write_text(json.dumps(task))
environment = {
    **os.environ,
    "HF_HOME": str(work / "hub"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OPENAI_API_KEY": "unused",
}


def evaluate(name, model, arguments, *flags):
    """Returns the items that the harness logs for a model, in order."""
    out = work / name
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model]
    command += ["--model_args", ",".join(arguments), "--tasks", TASK]
    command += ["--include_path", str(tasks), "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(out), *flags]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    (file,) = out.rglob(f"samples_{TASK}_*.jsonl")
    items = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(items, key=lambda item: item["doc_id"])


def log_likelihoods(item):
    """Returns the log-likelihood of each answer."""
    return [float(value) for value, _ in item["filtered_resps"]]


served = evaluate(
    "served",
    "local-completions",
    [
        f"model={model_name}",
        f"base_url={base_url}/completions",
        f"tokenizer={model_dir}",
        "num_concurrent=2",
        "max_retries=1",
        *further,
    ],
)
own = evaluate("own", "hf", [f"pretrained={model_dir}", "dtype=float32"], "--device", "cpu")
assert len(served) == len(own) == len(rows), (len(served), len(own))
worst = 0.0
for got, want in zip(served, own, strict=True):
    assert got["doc"] == want["doc"], (got, want)
    pairs = list(zip(log_likelihoods(got), log_likelihoods(want), strict=True))
    assert len(pairs) == len(ANSWERS), got
    for a, b in pairs:
        difference = abs(a - b) / abs(b)
        assert difference <= RELATIVE, (a, b, got, want)
        worst = max(worst, difference)
    for metric in ("acc", "acc_norm"):
        assert got[metric] == want[metric], (metric, got, want)
print(f"{len(own)} items agree, log-likelihoods within {worst:.1e}")
