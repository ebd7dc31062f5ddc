"""Scores without a pause over two replicas with deploy/gateway/service-config.json, until told to stop; a call that fails ends it.

Usage: python balanced.py PROTO_DIR SERVICE_CONFIG MODEL_NAME ADDRESS,ADDRESS. Prints a line after the first calls; stops at the end of its input.
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
subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"--python_out={stubs}", f"--grpc_python_out={stubs}", *files], check=True)
shutil.rmtree(Path(stubs) / "google", ignore_errors=True)
sys.path.insert(0, stubs)
from bradley.v1 import scoring_pb2, scoring_pb2_grpc  # noqa: E402


def chat(role, text):
    return scoring_pb2.Text(chat=scoring_pb2.MessageList(messages=[scoring_pb2.Message(role=role, content=text)]))


pair = scoring_pb2.Pair(id="x", prompt=chat("user", "Name a colour."), a=chat("assistant", "Blue."), b=chat("assistant", "It depends."))
request = scoring_pb2.ScorePairsRequest(options=scoring_pb2.ScoringOptions(policy=f"models/{model_name}"), pairs=[pair])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
# The list of addresses is no authority.
options = [("grpc.service_config", Path(config).read_text()), ("grpc.default_authority", "bradley")]
calls, peers, margins = 0, set(), set()
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
