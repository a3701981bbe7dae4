"""The section `serve` of params.yaml."""

from typing import Annotated, Literal

import msgspec

from stages.params import Count, Positive, Share

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
# no https: the way there is not encrypted
Address = Annotated[str, msgspec.Meta(pattern=r"^http://(\[[\da-f:]+\]|[\w.-]+)(:\d{1,5})?/v1$")]


class Serve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `serve`. `port` 0 takes a free one."""

    model: str  # a folder that export wrote, or models:/<name>@<alias>, which is followed when the alias moves
    host: str
    port: Port
    engine: Literal["llama.cpp", "vllm"]
    parallel: Positive  # answers of one engine at once
    max_waiting: Count  # requests that wait beyond those; further ones get 503
    requests_per_minute: Positive  # of one key, or of one address where there are no keys; further ones get 429
    passages: Count  # of the documentation that the model sees with each question; 0: none
    min_similarity: Share  # of a question and the documentation; where nothing is as near, the answer says so
    hosts: tuple[str, ...] = ()  # names that the server may be asked by, beside its addresses and localhost
    replicas: Positive = 1  # engines that answer, each with its own copy of the model
    endpoints: tuple[Address, ...] = ()  # llama.cpp servers started elsewhere, which answer in place of engines of ours

    @property
    def engines(self) -> int:
        """How many engines answer when all is well."""
        return len(self.endpoints) or self.replicas
