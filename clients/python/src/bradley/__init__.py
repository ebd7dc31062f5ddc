"""Client of Bradley: trains language models with DPO and scores preference pairs.

`Client` and `AsyncClient` call a server. `Scorer` is one stage of a data pipeline: Ray Data, Spark,
Daft, `datasets`, pandas or Arrow. The messages that calls return are those of proto/bradley/v1, in
the package `bradley.v1`; generated texts are `Completions`.
"""

from importlib import metadata

# First, because it sets a variable that gRPC reads when it is imported.
from bradley import forked  # noqa: F401
from bradley.aio import AsyncClient
from bradley.client import Client
from bradley.errors import (
    AbortedError,
    AlreadyExistsError,
    BradleyError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    Resource,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from bradley.generation import Completion, CompletionDelta, Completions
from bradley.retry import RetryPolicy
from bradley.scorer import Scorer

__version__ = metadata.version("bradley-client")

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "BradleyError",
    "CancelledError",
    "Client",
    "Completion",
    "CompletionDelta",
    "Completions",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FieldViolation",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Resource",
    "ResourceExhaustedError",
    "RetryPolicy",
    "Scorer",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]
