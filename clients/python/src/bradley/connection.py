"""The address of a server with the credentials, and the channels that are opened with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import grpc
import grpc.aio

DEFAULT_TARGET = "http://127.0.0.1:50051"
_MAX_RECEIVED_BYTES = 256 << 20
_PORT = 50051
_CONNECT_SECONDS = 5.0

Pem = str | os.PathLike[str] | bytes
"""A file in PEM format, or its content."""


@dataclass(frozen=True)
class Address:
    """An address with its credentials, as plain values that can be pickled."""

    target: str | None = None
    token: str | Callable[[], str] | None = field(default=None, repr=False)
    ca: Pem | None = None
    cert: Pem | None = None
    key: Pem | None = None

    def where(self) -> tuple[str, bool]:
        """Returns gRPC's name of the server, and true if it is reached over TLS.

        Raises `ValueError` if the address is not of a known form.
        """
        given = self.target or os.environ.get("BRADLEY_SERVER") or DEFAULT_TARGET
        scheme, separator, rest = given.partition("://")
        if not separator:
            scheme, rest = "", given
        certificates = self.ca is not None or self.cert is not None
        if scheme in ("http", "https"):
            tls = scheme == "https"
            if certificates and not tls:
                raise ValueError(
                    f"{given} is without TLS, but certificates are given: write https://{rest}"
                )
            name = rest.rstrip("/")
            # The default port of gRPC's resolver is 443.
            has_port = name.rpartition(":")[2].isdigit() and not name.endswith("]")
            return (name if has_port else f"{name}:{_PORT}"), tls
        if scheme in ("", "dns", "ipv4", "ipv6", "unix"):
            # Files named by the environment are for https only, as with `bradley`.
            return given, certificates
        raise ValueError(f"{given}: write http://HOST:PORT, https://HOST:PORT or dns:///HOST:PORT")

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the headers of a call. A token may change from call to call."""
        token = self.token if self.token is not None else os.environ.get("BRADLEY_TOKEN", "")
        token = token() if callable(token) else token
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel(self, connect_timeout: float) -> grpc.Channel:
        """Opens a channel for the synchronous client."""
        name, tls = self.where()
        options = _options(name, connect_timeout)
        if tls:
            return grpc.secure_channel(name, self._credentials(), options=options)
        return grpc.insecure_channel(name, options=options)

    def aio_channel(self, connect_timeout: float) -> grpc.aio.Channel:
        """Opens a channel for the asynchronous client."""
        name, tls = self.where()
        options = _options(name, connect_timeout)
        if tls:
            return grpc.aio.secure_channel(name, self._credentials(), options=options)
        return grpc.aio.insecure_channel(name, options=options)

    def _credentials(self) -> grpc.ChannelCredentials:
        pem = [
            _pem(given, variable)
            for given, variable in (
                (self.ca, "BRADLEY_TLS_SERVER_CA"),
                (self.key, "BRADLEY_TLS_CLIENT_KEY"),
                (self.cert, "BRADLEY_TLS_CLIENT_CERT"),
            )
        ]
        if (pem[1] is None) != (pem[2] is None):
            raise ValueError("cert and key must be given together")
        return grpc.ssl_channel_credentials(*pem)


def _pem(given: Pem | None, variable: str) -> bytes | None:
    given = given if given is not None else os.environ.get(variable) or None
    return given if given is None or isinstance(given, bytes) else Path(given).read_bytes()


def _options(name: str, connect_timeout: float) -> list[tuple[str, str | int]]:
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES),
        ("grpc.max_send_message_length", -1),
        # A peer that has vanished is noticed after 50 seconds.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Retries are those of RetryPolicy.
        ("grpc.enable_retries", 0),
        ("grpc.primary_user_agent", f"bradley-client/{metadata.version('bradley-client')}"),
        # Clients of one process do not share a connection, so that each of them can be balanced.
        ("grpc.use_local_subchannel_pool", 1),
        # In spite of its name, the time that setting up a connection may take, TLS included.
        ("grpc.min_reconnect_backoff_ms", int(min(connect_timeout, _CONNECT_SECONDS) * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if name.startswith("dns:"):
        # Several replicas: calls go to each of them in turn.
        options.append(("grpc.lb_policy_name", "round_robin"))
    return options
