"""Checks traces end to end: a score and a training job each give one trace.

The client uses OpenTelemetry's SDK and gRPC instrumentation. This program is also the collector to
which client and server send their spans.

Usage: python traces.py PROTO_DIR PAIRS.jsonl MODEL_NAME

Prints the collector's port, reads the server's address, and prints the traces.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

protos, pairs_file, model_name = sys.argv[1:]
spans, arrived = {}, threading.Condition()


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        with arrived:
            for resource in request.resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}[
                    "service.name"
                ]
                for span in (s for scope in resource.scope_spans for s in scope.spans):
                    assert span.span_id not in spans, f"{span.name} arrived twice"
                    spans[span.span_id] = (service, span)
            arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


sink = grpc.server(futures.ThreadPoolExecutor(4))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Sink(), sink)
port = sink.add_insecure_port("127.0.0.1:0")
sink.start()
print(port, flush=True)
address = sys.stdin.readline().strip()

stubs = tempfile.mkdtemp()
files = [str(p) for p in Path(protos).rglob("*.proto")]
command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}"]
command += [f"--python_out={stubs}", f"--grpc_python_out={stubs}"]
subprocess.run([*command, *files], check=True)
shutil.rmtree(Path(stubs) / "google", ignore_errors=True)
sys.path.insert(0, stubs)
from bradley.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)  # noqa: E402

# The exporter's own calls are made before the instrumentation begins, and not traced.
exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{port}", insecure=True)
provider = TracerProvider(resource=Resource.create({"service.name": "client"}))
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
GrpcInstrumentorClient().instrument()
tracer = trace.get_tracer("client")
channel = grpc.insecure_channel(address)
datasets, training = (
    dataset_pb2_grpc.DatasetServiceStub(channel),
    training_pb2_grpc.TrainingServiceStub(channel),
)
scoring = scoring_pb2_grpc.ScoringServiceStub(channel)


def chat(role, text):
    return scoring_pb2.Text(
        chat=scoring_pb2.MessageList(messages=[scoring_pb2.Message(role=role, content=text)])
    )


def wait_for(what, found, seconds=60):
    deadline = time.monotonic() + seconds
    with arrived:
        while not (result := found()):
            left = deadline - time.monotonic()
            assert left > 0, (
                f"{what} never arrived; there are {sorted(s.name for _, s in spans.values())}"
            )
            arrived.wait(left)
        return result


def named(name, trace_id):
    return [
        s
        for service, s in spans.values()
        if s.name == name and s.trace_id == trace_id and service == "bradley"
    ]


def within(name, parent, n=None):
    """Returns the server's spans of this name that are children of `parent`."""
    found = [s for s in named(name, parent.trace_id) if s.parent_span_id == parent.span_id]
    assert found and (n is None or len(found) == n), f"{name}: {len(found)} under {parent.name}"
    assert all(s.start_time_unix_nano <= s.end_time_unix_nano for s in found)
    return found


def server_span(method, trace_id):
    """Returns the server's span of a call. Its parent is gRPC's span of the client, and the parent
    of that is one of this program's own spans."""
    (span,) = wait_for(method, lambda: named(method, trace_id))
    service, call = spans[span.parent_span_id]
    assert service == "client" and call.trace_id == trace_id, call
    assert spans[call.parent_span_id][1].name.startswith("our "), call
    assert span.kind == 2, span
    return span


# A score.
pair = scoring_pb2.Pair(
    id="x",
    prompt=chat("user", "Name a colour."),
    a=chat("assistant", "Blue."),
    b=chat("assistant", "It depends."),
)
with tracer.start_as_current_span("our score") as ours:
    request = scoring_pb2.ScorePairsRequest(
        options=scoring_pb2.ScoringOptions(policy=f"models/{model_name}"), pairs=[pair, pair]
    )
    answer, call = scoring.ScorePairs.with_call(request)
score_trace = ours.get_span_context().trace_id.to_bytes(16, "big")
told = dict(call.initial_metadata())["traceparent"]
call = server_span("bradley.v1.ScoringService/ScorePairs", score_trace)
assert told == f"00-{score_trace.hex()}-{call.span_id.hex()}-01", told
wait_for("device spans", lambda: len(named("scoring.device", score_trace)) == 2)
within("scoring.tokenize", call, 2)
within("scoring.queue", call, 2)
for device in within("scoring.device", call, 2):
    (link,) = device.links
    _, batch = wait_for("the batch", lambda: spans.get(link.span_id))
    assert batch.name == "scoring.batch" and batch.trace_id != score_trace
    assert call.span_id in [other.span_id for other in batch.links], batch
    assert device.end_time_unix_nano <= call.end_time_unix_nano
print("score:", sorted(s.name for _, s in spans.values() if s.trace_id == score_trace))

# A training job, from the call that made it.
with tracer.start_as_current_span("our job") as ours:
    data = Path(pairs_file).read_bytes()
    parts = [
        dataset_pb2.UploadDatasetRequest(
            metadata=dataset_pb2.UploadMetadata(display_name="traced")
        ),
        dataset_pb2.UploadDatasetRequest(chunk=data),
    ]
    dataset = datasets.UploadDataset(iter(parts))
    job = training_pb2.TrainingJob(policy=f"models/{model_name}", dataset=dataset.name)
    job.lora.rank = 4
    job.batch.batch_size, job.batch.max_length, job.batch.max_steps = 2, 256, 6
    job.run.logging_steps, job.run.save_steps = 2, 3
    name = training.CreateTrainingJob(training_pb2.CreateTrainingJobRequest(training_job=job)).name
job_trace = ours.get_span_context().trace_id.to_bytes(16, "big")
created = server_span("bradley.v1.TrainingService/CreateTrainingJob", job_trace)
(run,) = wait_for("the job's span", lambda: named("training job", job_trace), 120)
assert run.parent_span_id == created.span_id, run
within("training.prepare", run, 1)
within("training.load", run, 1)
within("training.steps", run, 3)
within("training.checkpoint", run, 2)
assert {a.key: a.value.string_value for a in run.attributes}["training_job"] == name.split("/")[1]
print("job:", sorted(s.name for _, s in spans.values() if s.trace_id == job_trace))

print(json.dumps({"score": score_trace.hex(), "job": job_trace.hex()}))
sink.stop(None)
