"""Calls from a forked process, where gRPC cannot be used.

gRPC keeps threads and state that a fork copies only in part: calls in the child can hang, or end
the process. So the child starts a new Python that makes its calls, and talks with it through pipes.

gRPC's own handlers of forks start its threads again in the child, although some of their state is
missing there. Now and then this ended a child that did not even use gRPC (grpcio 1.85), so they are
switched off, unless the variable says otherwise or gRPC was imported before this package.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


# Not on Windows, which has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Returns true if this process was forked from one that had imported this package already."""
    return _is_forked


class Token:
    """The token of the current call, where a function of the forked process returns it."""

    def __init__(self) -> None:
        self.value = ""

    def __call__(self) -> str:
        return self.value


class NewPython:
    """A new Python that calls a function. It ends with the process that has started it."""

    def __init__(self, function: Callable[[Any], Any], token: Token) -> None:
        """Starts the process. `function` is pickled together with `token`, which it may use."""
        if not sys.executable:
            raise RuntimeError(
                "a forked process needs a Python of its own for its calls, but sys.executable is "
                "not set: start the workers with the method spawn or forkserver"
            )
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from bradley import forked; forked.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            # Ctrl-C ends the process that has started it, and with it the input.
            start_new_session=True,
        )
        self._send((function, token))

    @property
    def is_running(self) -> bool:
        """False if the process has ended."""
        return self._child.poll() is None

    def call(self, argument: Any, token: str) -> Any:
        """Returns the function's value, or raises its exception."""
        with self._lock:
            self._send((argument, token))
            assert self._child.stdout is not None
            try:
                value, error = pickle.load(self._child.stdout)
            except EOFError:
                raise self._ended() from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.communicate()

    def _send(self, message: object) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(pickle.dumps(message))
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        return RuntimeError(
            "the Python that makes the calls of this forked process has ended with exit status "
            f"{self._child.wait()}; the reason may be on stderr"
        )


def main() -> None:
    """Answers the calls on stdin until it is closed."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Output of libraries does not get between the answers.
    os.dup2(2, 1)
    function, token = pickle.load(calls)
    while True:
        try:
            argument, token.value = pickle.load(calls)
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = (function(argument), None)
        except Exception as error:
            answer = (None, error)
        try:
            answers.write(pickle.dumps(answer))
            answers.flush()
        except BrokenPipeError:
            return
