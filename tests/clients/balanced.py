"""Scores one pair again and again on two replicas, with the service config of deploy/gateway.

Usage: python balanced.py PROTO_DIR SERVICE_CONFIG MODEL_NAME ADDRESS,ADDRESS

Prints "started" after 50 calls, and stops at the end of its input, after at least 100 calls. A
failed call is an error.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import grpc

protos, config, model_name, addresses = sys.argv[1:]
stubs = tempfile.mkdtemp()
files = [str(p) for p in Path(protos).rglob("*.proto")]
command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}"]
command += [f"--python_out={stubs}", f"--grpc_python_out={stubs}"]
subprocess.run([*command, *files], check=True)
shutil.rmtree(Path(stubs) / "google", ignore_errors=True)
sys.path.insert(0, stubs)
from bradley.v1 import scoring_pb2, scoring_pb2_grpc  # noqa: E402


def chat(role, text):
    message = scoring_pb2.Message(role=role, content=text)
    return scoring_pb2.Text(chat=scoring_pb2.MessageList(messages=[message]))


pair = scoring_pb2.Pair(
    id="x",
    prompt=chat("user", "Name a colour."),
    a=chat("assistant", "Blue."),
    b=chat("assistant", "It depends."),
)
scoring_options = scoring_pb2.ScoringOptions(policy=f"models/{model_name}")
request = scoring_pb2.ScorePairsRequest(options=scoring_options, pairs=[pair])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
# Without an authority gRPC would send the list of addresses, which is not a valid one.
options = [
    ("grpc.service_config", Path(config).read_text()),
    ("grpc.default_authority", "bradley"),
]
calls, margins = 0, set()
with grpc.insecure_channel(f"ipv4:{addresses}", options=options) as channel:
    scoring = scoring_pb2_grpc.ScoringServiceStub(channel)
    while not stop.is_set() or calls < 100:
        answer, call = scoring.ScorePairs.with_call(request, timeout=20, wait_for_ready=True)
        margins.add(answer.results[0].score.margin)
        calls += 1
        if calls == 50:
            print("started", flush=True)
assert len(margins) == 1, margins
print(f"{calls} calls, none failed")
