"""Where an OpenAI-style server listens."""

import socket
from typing import Annotated
from urllib.parse import urlsplit

import msgspec


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`url` ends with /v1; `model` is the name that the server knows its model by."""

    url: Annotated[
        str, msgspec.Meta(pattern=r"^https?://(\[[\da-f:]+\]|[\w.-]+)(:\d{1,5})?(/[^\s@?#]+)?/v1$")
    ]  # no name:password@, since errors show it
    model: str
    api_key_env: str = ""  # the environment variable that holds this server's key; empty: it gets none

    def __post_init__(self) -> None:
        _ = urlsplit(self.url).port  # raises ValueError above 65535


def free_port(host: str = "127.0.0.1") -> int:
    """A port of the loopback address `host` that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
