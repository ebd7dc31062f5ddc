"""What both clients have in common besides their requests: settings, and the rules of retries."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import grpc

from bradley.connection import Address
from bradley.errors import BradleyError, from_info, from_rpc
from bradley.retry import Deadline, RetryPolicy


class Session:
    """The settings of a client, and whether there has ever been a connection to its server."""

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
        self.was_reached = False

    def settings(self, seconds: float) -> dict[str, Any]:
        """Returns the arguments of gRPC for a call of at most that many seconds."""
        return {"timeout": max(seconds, 0.001), "metadata": self.address.call_metadata()}

    def explained(self, rpc_error: grpc.RpcError) -> BradleyError:
        """Returns the exception for a failed call; its message has a remedy."""
        error = from_rpc(rpc_error)
        # An error with a reason comes from the server.
        is_unanswered = not error.reason and (error.is_lost_connection or error.is_timeout)
        if not self.was_reached and is_unanswered:
            return _with_message(
                error,
                f"cannot reach {self.address.where()[0]}: {error.message}: check the address, that "
                "`bradley serve` runs there, and https:// for a server with TLS",
            )
        self.was_reached = True
        if error.is_timeout:
            return _with_message(
                error, f"{error.message}: give a longer timeout if the call needs more time"
            )
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

        Nothing is sent before the first connection, so that a server that still starts is waited
        for, and an error after it is known to be that of a lost connection. If there is no
        connection in this time, the call itself says why; half of its time is left for that.
        """
        if self._session.was_reached:
            return 0.0
        return max(0.0, min(self._connect.remaining(), self._deadline.remaining() / 2))

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of gRPC for the next attempt."""
        return self._session.settings(self._deadline.remaining())

    def connected(self) -> None:
        """Notes that there is a connection."""
        self._session.was_reached = True

    def answered(self) -> None:
        """Notes an answer of the server. Later failures are counted from 0."""
        self._session.was_reached = True
        self._failures = 0

    def delay(self, error: grpc.RpcError | BradleyError) -> float:
        """Returns the seconds before the next attempt. Raises the error if there is none."""
        if isinstance(error, BradleyError):
            # An error inside an answer.
            explained, cause, self._session.was_reached = error, None, True
        else:
            explained, cause = self._session.explained(error), error
        self._failures += 1
        delay = self._retry.delay(explained, self._failures, repeatable=self._repeatable)
        if delay is None or not self._deadline.allows(delay):
            raise explained from cause
        if not self._session.was_reached and not self._connect.allows(delay):
            raise explained from cause
        return delay


def _with_message(error: BradleyError, message: str) -> BradleyError:
    return from_info(dataclasses.replace(error.info, message=message))


@contextlib.contextmanager
def cancelled_at_exit(stream: Any) -> Iterator[None]:
    """Ends a stream that its reader leaves."""
    try:
        yield
    finally:
        stream.cancel()
