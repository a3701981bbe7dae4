"""Where an OpenAI-style server listens."""

import socket

import msgspec


class Endpoint(msgspec.Struct, frozen=True):
    """`url` ends with /v1; `model` is the name that the server knows its model by."""

    url: str
    model: str


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
