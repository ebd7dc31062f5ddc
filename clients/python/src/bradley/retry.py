"""Retries: after the delay that the server asks for, within the time of the call."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from bradley.errors import BradleyError


@dataclass(frozen=True)
class RetryPolicy:
    """Settings of retries.

    A call is repeated in two cases: if the server's error asks for it (RetryInfo), after the delay
    in that error; or if the connection was lost and the call can be repeated without harm. All
    attempts and delays together last at most as long as the call's `timeout`.
    """

    max_attempts: int = 30
    """Number of attempts, the first one included, if connections are lost. 1 turns all retries off.
    Retries that the server asks for are limited by the call's `timeout` only."""
    first_delay: float = 0.2
    """Seconds before the first retry after a lost connection. Each further delay is doubled."""
    max_delay: float = 10.0
    """Maximum delay after a lost connection, in seconds. A random part of up to a fifth is added to
    it, as to all delays. The server's own delays may be longer."""

    def delay(self, error: BradleyError, failures: int, *, repeatable: bool) -> float | None:
        """Returns the seconds before the next attempt, or `None` if there must be none.

        `failures` is the number of failed attempts. `repeatable` is true if the call may be
        repeated although the server may have carried it out.
        """
        if self.max_attempts <= 1:
            return None
        # A random part, so that the clients of a server do not all come back at the same moment.
        jitter = 1 + 0.2 * random.random()
        if error.retry_delay is not None:
            return error.retry_delay * jitter
        if repeatable and error.is_lost_connection and failures < self.max_attempts:
            return min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 20)) * jitter
        return None


def given(timeout: float | None, default: float) -> float:
    """Returns a timeout, or the default if none is given."""
    return default if timeout is None else timeout


class Deadline:
    """The end of a call's time."""

    def __init__(self, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}: give a number of seconds above 0")
        self._end = time.monotonic() + timeout

    def remaining(self) -> float:
        """Returns the seconds that are left; negative if the time is over."""
        return self._end - time.monotonic()

    def allows(self, delay: float) -> bool:
        """Returns true if there is time left after a delay."""
        return delay < self.remaining()
