"""Where a stage's units of work are done: in its own process, or by workers on the nodes of a Ray cluster.

DVC stays the record and Ray Data the scheduler: a stage hands over its units and waits. Any engine gives the same results.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec

from stages.params import Positive
from stages.program.errors import ServerFailed

__all__ = ["LOCAL", "Done", "Executor", "Work", "done_on_ray"]

Work = Callable[[bytes], bytes]  # does one unit


class Executor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `executor` of params.yaml. It changes no output, so it is no param of a stage in dvc.yaml."""

    engine: Literal["local", "ray"]
    address: Annotated[str, msgspec.Meta(pattern=r"^$|^auto$|^(\[[\da-f:]+\]|[\w.-]+):\d{1,5}$")]  # of the head of the cluster
    workers: Positive
    attempts: Positive  # at a unit that fails; a few more where it ends its worker and others were at work


class Done(msgspec.Struct, frozen=True):
    """A unit that came to its end: with a `result`, or with the reason why it has none after all attempts."""

    name: str
    result: bytes = b""
    failed: str = ""


WORKER_ENDED = "the worker that did it ended: killed, out of memory, or its node is gone"
LOCAL = Executor(engine="local", address="", workers=1, attempts=1)


def done_on_ray(
    executor: Executor,
    units: Mapping[str, bytes],
    make: Callable[..., Work],
    arguments: tuple[Any, ...],
    *,
    at_once: int,
    has_model: bool,
) -> Iterator[Done]:
    """Each of `units` when it is done, in any order, by workers on the cluster of `executor`.

    A worker makes its `Work` by `make(*arguments)`, once, and does `at_once` units at a time; one that runs a model takes a GPU where
    the cluster has one. A node that is lost costs the units that were at work there, which are done again by others, one at a time.
    Raises the DocsmithError of a worker, with its node's name, ServerFailed where no cluster answers or no worker stays, and BadParams.
    """
    from stages.executor.cluster import ResultLost, attempt, connect

    connect(executor)
    left = dict(units)
    tries: Counter[str] = Counter()
    # some wait at each worker, since Ray Data looks only ten times a second for units that are done
    together = (at_once, 4 + at_once // 4)
    while left:
        failed, before = {}, len(left)
        try:
            for done in attempt(left, make, arguments, executor, *together, has_model):
                if done.failed:
                    failed[done.name] = done.failed
                else:
                    del left[done.name]
                    yield done
        except ResultLost as lost:
            if len(left) == before:
                raise ServerFailed(
                    f"the Ray cluster lost what its workers had done ({lost}); what came before is kept. Resume with: dvc repro"
                ) from None
            continue
        tries.update(left.keys())
        # whether a unit ended its worker or was only sent to one that had ended cannot be told, unless none is left that does not
        given_up = failed if len(left) < before else left
        for name in [name for name in left if name in given_up and tries[name] >= executor.attempts]:
            del left[name]
            yield Done(name, failed=f"failed {tries[name]} times on the cluster ({failed.get(name, WORKER_ENDED)})")
        together = (1, 0)  # one that ends its worker must not take others down with it again
