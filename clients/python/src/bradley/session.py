"""What both clients have in common besides their requests: settings, and the rules of retries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import grpc

from bradley.connection import Address
from bradley.errors import BradleyError, ErrorInfo, from_info, from_rpc
from bradley.retry import Deadline, RetryPolicy


class Session:
    """The settings of a client, and the knowledge whether its server has ever answered."""

    def __init__(
        self,
        address: Address,
        retry: RetryPolicy | None,
        *,
        timeout: float,
        scoring_timeout: float,
        connect_timeout: float,
    ) -> None:
        self.address, self.retry = address, retry or RetryPolicy()
        self.timeout, self.scoring_timeout = timeout, scoring_timeout
        self.connect_timeout = connect_timeout
        self.has_answered = False

    def settings(self, seconds: float) -> dict[str, Any]:
        """Returns the arguments of gRPC for a call of at most that many seconds."""
        return {"timeout": max(seconds, 0.001), "metadata": self.address.call_metadata()}

    def explained(self, rpc_error: grpc.RpcError) -> BradleyError:
        """Returns the exception for a failed call. For a server that has never answered, it names
        the address."""
        error = from_rpc(rpc_error)
        if self.has_answered or error.is_timeout:
            return error
        if error.is_lost_connection:
            return _unreachable(self.address, error)
        self.has_answered = True
        return error


class Attempts:
    """The attempts of one call: when the next one begins, and when there is none."""

    def __init__(
        self,
        session: Session,
        deadline: Deadline | None,
        *,
        repeatable: bool,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`repeatable` is true if the call may be repeated although the server may have carried it
        out. Without a deadline, the attempts may last forever."""
        self._session, self._retry = session, retry or session.retry
        self._deadline = deadline or Deadline(math.inf)
        self._connect = Deadline(session.connect_timeout)
        self._repeatable = repeatable
        self._failures = 0

    def seconds_to_connect(self) -> float:
        """Returns the seconds to wait for a connection before the first attempt; 0 for none.

        A call that may not be repeated is not sent before there is a connection, so that a server
        that still starts is waited for. If there is none, the call itself says why.
        """
        if self._repeatable or self._session.has_answered:
            return 0.0
        return max(0.0, min(self._connect.remaining(), self._deadline.remaining()))

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of gRPC for the next attempt."""
        return self._session.settings(self._deadline.remaining())

    def answered(self) -> None:
        """Notes an answer of the server. Later failures are counted from 0."""
        self._session.has_answered = True
        self._failures = 0

    def delay(self, error: grpc.RpcError | BradleyError) -> float:
        """Returns the seconds before the next attempt. Raises the error if there is none."""
        if isinstance(error, BradleyError):
            # An error inside an answer.
            explained, cause, self._session.has_answered = error, None, True
        else:
            explained, cause = self._session.explained(error), error
        self._failures += 1
        delay = self._retry.delay(explained, self._failures, repeatable=self._repeatable)
        if delay is None or not self._deadline.allows(delay):
            raise explained from cause
        if not self._session.has_answered and not self._connect.allows(delay):
            raise explained from cause
        return delay


def _unreachable(address: Address, error: BradleyError) -> BradleyError:
    message = (
        f"cannot reach {address.where()[0]}: {error.message}: check the address, that "
        "`bradley serve` runs there, and https:// for a server with TLS"
    )
    return from_info(ErrorInfo(error.code, message, request_id=error.request_id))


@contextlib.contextmanager
def cancelled_at_exit(stream: Any) -> Iterator[None]:
    """Ends a stream that its reader leaves."""
    try:
        yield
    finally:
        stream.cancel()
