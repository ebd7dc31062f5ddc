"""Trains and scores with grpcio and the protos alone, and loads the adapter with peft.

Uploads rows, submits a job, streams its events with interruptions, scores pairs, downloads the
adapter, and compares peft's log-probs with the served ones.

Usage: python cycle.py ADDRESS PROTO_DIR PAIRS.jsonl BASE_MODEL_DIR MODEL_NAME OUT_DIR

BASE_MODEL_DIR may also be a GGUF file.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc

address, protos, pairs_file, base_dir, model_name, out_dir = sys.argv[1:]
stubs = tempfile.mkdtemp()
files = [str(p) for p in Path(protos).rglob("*.proto")]
command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}"]
command += [f"--python_out={stubs}", f"--grpc_python_out={stubs}"]
subprocess.run([*command, *files], check=True)
# The module google.rpc is that of googleapis-common-protos, not one made from the vendored proto.
import shutil

shutil.rmtree(Path(stubs) / "google", ignore_errors=True)
sys.path.insert(0, stubs)
from bradley.v1 import (  # noqa: E402
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

channel = grpc.insecure_channel(address)
datasets = dataset_pb2_grpc.DatasetServiceStub(channel)
training = training_pb2_grpc.TrainingServiceStub(channel)
scoring = scoring_pb2_grpc.ScoringServiceStub(channel)
checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(channel)

# Upload, in small chunks.
data = Path(pairs_file).read_bytes()
rows = [json.loads(line) for line in data.splitlines() if line.strip()]


def upload():
    yield dataset_pb2.UploadDatasetRequest(
        metadata=dataset_pb2.UploadMetadata(display_name="python", model=f"models/{model_name}")
    )
    for i in range(0, len(data), 1000):
        yield dataset_pb2.UploadDatasetRequest(chunk=data[i : i + 1000])


dataset = datasets.UploadDataset(upload())
assert dataset.report.valid_rows == len(rows), dataset
print("uploaded", dataset.name, dataset.report.rows)

# Submit; a bad request is refused with its fields.
job = training_pb2.TrainingJob(policy=f"models/{model_name}", dataset=dataset.name, seed=1)
job.lora.rank = 4
job.optimizer.learning_rate = 1e-2
job.batch.batch_size, job.batch.max_length, job.batch.max_steps = 2, 256, 30
job.run.save_steps = 10
bad = training_pb2.TrainingJob()
bad.CopyFrom(job)
bad.dpo.beta = -1
try:
    training.CreateTrainingJob(training_pb2.CreateTrainingJobRequest(training_job=bad))
    raise SystemExit("a negative beta was accepted")
except grpc.RpcError as e:
    assert e.code() == grpc.StatusCode.INVALID_ARGUMENT and "beta" in e.details(), e
name = training.CreateTrainingJob(training_pb2.CreateTrainingJobRequest(training_job=job)).name

# Stream: cancel after every seven events, and continue after the last received event.
events, cursor = [], 0
while True:
    stream = training.StreamTrainingEvents(
        training_pb2.StreamTrainingEventsRequest(parent=name, after_sequence=cursor), timeout=600
    )
    ended = True
    for n, event in enumerate(stream):
        events.append(event)
        cursor = event.sequence
        if n == 6:
            stream.cancel()
            ended = False
            break
    if ended:
        break
assert [e.sequence for e in events] == list(range(1, len(events) + 1)), (
    "an event was lost or delivered twice"
)
steps = [e.step_metrics for e in events if e.WhichOneof("event") == "step_metrics"]
assert [s.step for s in steps] == list(range(1, 31))
stored = training.ListTrainingEvents(
    training_pb2.ListTrainingEventsRequest(parent=name, page_size=1000)
).events
assert list(stored) == events, "the streamed events are not the stored ones"
assert (
    training.GetTrainingJob(training_pb2.GetTrainingJobRequest(name=name)).state
    == training_pb2.JOB_STATE_SUCCEEDED
)
print(
    "streamed",
    len(events),
    "events; loss",
    round(steps[0].metrics["loss"], 4),
    "to",
    round(steps[-1].metrics["loss"], 4),
)


# Score, unary and streaming.
def text(messages):
    return scoring_pb2.Text(
        chat=scoring_pb2.MessageList(messages=[scoring_pb2.Message(**m) for m in messages])
    )


pairs = [
    scoring_pb2.Pair(
        id=r["id"], prompt=text(r["prompt"]), a=text(r["chosen"]), b=text(r["rejected"])
    )
    for r in rows
]
options = scoring_pb2.ScoringOptions(policy=f"{name}/checkpoints/latest", per_token_logprobs=True)
response = scoring.ScorePairs(
    scoring_pb2.ScorePairsRequest(options=options, pairs=pairs), timeout=60
)
scores = {r.id: r.score for r in response.results}
assert all(s.probability > 0.5 for s in scores.values()), scores


def stream_pairs():
    yield scoring_pb2.StreamScorePairsRequest(options=options)
    for p in pairs:
        yield scoring_pb2.StreamScorePairsRequest(pair=p)


streamed = {
    a.result.id: a.result.score for a in scoring.StreamScorePairs(stream_pairs(), timeout=60)
}
assert streamed == scores, "the stream has other scores than the unary call"
print("scored", len(scores), "pairs")

# Download the adapter.
out, current = Path(out_dir), None
out.mkdir(parents=True, exist_ok=True)
expected = {}
for part in checkpoints.DownloadCheckpoint(
    checkpoint_pb2.DownloadCheckpointRequest(
        name=f"{name}/checkpoints/latest", format=checkpoint_pb2.EXPORT_FORMAT_ADAPTER
    )
):
    if part.WhichOneof("part") == "file":
        current = open(out / part.file.path, "wb")
        expected[part.file.path] = part.file.size_bytes
    else:
        current.write(part.chunk)
        current.flush()
assert {p.name: p.stat().st_size for p in out.iterdir()} == expected, expected
print("downloaded", {k: hashlib.sha256((out / k).read_bytes()).hexdigest()[:12] for k in expected})

# The adapter in peft gives the served log-probs.
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

if base_dir.endswith(".gguf"):
    gguf = Path(base_dir)
    base = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights were dequantised to f32, so PEFT must not treat the model as quantised.
    base.is_quantized, base.hf_quantizer = False, None
else:
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
model = PeftModel.from_pretrained(base, out)
worst = 0.0
for row in rows:
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    for side, served in (("chosen", scores[row["id"]].a), ("rejected", scores[row["id"]].b)):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].float()
        n = len(prompt)
        logp = torch.log_softmax(logits, -1)[n - 1 : -1].gather(
            1, torch.tensor(whole[n:])[:, None]
        )[:, 0]
        assert list(served.token_ids) == whole[n:], row["id"]
        worst = max(
            worst, abs(logp.sum().item() - served.policy_logprob) / abs(served.policy_logprob)
        )
assert worst < 1e-4, worst
print("peft agrees within", worst)
