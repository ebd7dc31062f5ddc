"""Errors of the server as exceptions.

The server sends its errors with google.rpc details. An exception has them as attributes: the code,
a stable reason, the fields that were refused, the resource, and the delay before a retry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS = "grpc-status-details-bin"
_REQUEST_ID = "x-request-id"


@dataclass(frozen=True)
class FieldViolation:
    """A field of a request that the server refused."""

    field: str
    """Path of the field, e.g. `training_job.dpo.beta`. Empty in the last entry of a long list,
    which says how many more there are."""
    description: str
    """The problem and its remedy."""


@dataclass(frozen=True)
class Resource:
    """The resource that an error is about."""

    type: str
    """Kind of the resource, e.g. `job`."""
    name: str
    """Name of the resource, e.g. `trainingJobs/…`."""


@dataclass(frozen=True)
class ErrorInfo:
    """Everything that is known about an error."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    resource: Resource | None = None
    retry_delay: float | None = None
    request_id: str = ""


class BradleyError(Exception):
    """A call failed, or a row could not be scored.

    There is a subclass for each gRPC code that the server uses. The reason is more specific than
    the code, and never changes its meaning: QUEUE_FULL, DRAINING, MODEL_CHANGED, ….
    """

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info)
        self.info = info

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in ("", self.code.name) else ""
        return f"{self.code.name}{reason}: {self.message}"

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code."""
        return self.info.code

    @property
    def message(self) -> str:
        """The server's message: the problem and its remedy."""
        return self.info.message

    @property
    def reason(self) -> str:
        """The stable reason; empty if the error comes from the connection, not from the server."""
        return self.info.reason

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The refused fields of the request."""
        return self.info.violations

    @property
    def resource(self) -> Resource | None:
        """The resource that does not exist; `None` for all other errors."""
        return self.info.resource

    @property
    def retry_delay(self) -> float | None:
        """The seconds after which the server asks for a retry; `None` if it asks for none."""
        return self.info.retry_delay

    @property
    def request_id(self) -> str:
        """The ID with which the server's log names the call; empty for the error of a row."""
        return self.info.request_id

    @property
    def is_lost_connection(self) -> bool:
        """True if the error comes from the connection, so that a repeated call may succeed."""
        return not self.reason and self.code in _CONNECTION_CODES

    @property
    def is_timeout(self) -> bool:
        """True if the time of the call is over. The server may have carried it out."""
        # The server also ends a call at its deadline, and may be a moment earlier than gRPC here.
        is_of_call = self.reason in ("", grpc.StatusCode.DEADLINE_EXCEEDED.name)
        return is_of_call and self.code is grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(BradleyError):
    """The call was cancelled."""


class InvalidArgumentError(BradleyError):
    """Fields of the request cannot be accepted; see `violations`."""


class DeadlineExceededError(BradleyError):
    """The call's `timeout` has passed."""


class NotFoundError(BradleyError):
    """The named resource does not exist; see `resource`."""


class AlreadyExistsError(BradleyError):
    """The request_id was used before with another body."""


class PermissionDeniedError(BradleyError):
    """The token lacks the required role, or the resource is another owner's or does not exist.

    Only a caller who may see every resource gets a `NotFoundError` for a job or dataset.
    """


class UnauthenticatedError(BradleyError):
    """The token is missing, unknown or has expired."""


class ResourceExhaustedError(BradleyError):
    """A limit or quota is reached."""


class FailedPreconditionError(BradleyError):
    """The resource is not in a state that allows the call."""


class AbortedError(BradleyError):
    """Another change came first, or the answer was read too slowly."""


class OutOfRangeError(BradleyError):
    """A cursor lies outside of the stored events, or a message is too large for the server."""


class UnimplementedError(BradleyError):
    """The server does not have the method: it is older, or no Bradley."""


class InternalError(BradleyError):
    """The server has a defect; its log describes it under `request_id`.

    With the reason PROTOCOL, the client itself has found an answer that violates the protocol.
    """


class UnavailableError(BradleyError):
    """The server cannot be reached, or cannot do this now; see `retry_delay`."""


_CLASSES: dict[grpc.StatusCode, type[BradleyError]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}
_CONNECTION_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
)
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_info(info: ErrorInfo) -> BradleyError:
    """Returns the exception of an error's code."""
    return _CLASSES.get(info.code, BradleyError)(info)


def protocol_error(message: str) -> BradleyError:
    """Returns the error for an answer that violates the protocol."""
    return from_info(ErrorInfo(grpc.StatusCode.INTERNAL, message, reason="PROTOCOL"))


def from_status(status: status_pb2.Status) -> BradleyError:
    """Returns the exception for an error inside an answer: of a pair, of a job."""
    return from_info(_info(status, request_id=""))


def from_rpc(error: grpc.RpcError) -> BradleyError:
    """Returns the exception for a failed call."""
    # Every error of a call has these methods, but the type has not.
    call: Any = error
    metadata = dict(call.trailing_metadata() or ())
    request_id = str(metadata.get(_REQUEST_ID, ""))
    details = metadata.get(_DETAILS)
    if isinstance(details, bytes):
        try:
            return from_info(_info(status_pb2.Status.FromString(details), request_id))
        except DecodeError:
            # A proxy sent something else under this name.
            pass
    return from_info(ErrorInfo(call.code(), call.details() or "", request_id=request_id))


def _info(status: status_pb2.Status, request_id: str) -> ErrorInfo:
    reason, resource, retry_delay = "", None, None
    violations: tuple[FieldViolation, ...] = ()
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        named = error_details_pb2.ResourceInfo()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif detail.Unpack(named):
            resource = Resource(named.resource_type, named.resource_name)
        elif detail.Unpack(retry):
            retry_delay = retry.retry_delay.ToNanoseconds() / 1e9
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return ErrorInfo(code, status.message, reason, violations, resource, retry_delay, request_id)
