"""How much memory there is, and the one line that is said when it runs out."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.program.errors import OutOfMemory

SIGNS = ("allocate memory", "out of memory", "unable to allocate", "alloc_failed", "bad_alloc")  # of PyTorch, CUDA, Linux, C++


class Memory(NamedTuple):
    """Bytes that this process may have and those that it has now; `kind` is what they are of."""

    there: int
    used: int
    kind: str

    def line(self) -> str:
        return f"{self.there / 1e9:.1f} GB of {self.kind} are there"


def memory() -> Memory:
    """That of the GPU where there is one; else of the machine, its container or `ulimit -v`, whichever is least."""
    import torch

    if torch.cuda.is_available():
        return Memory(torch.cuda.mem_get_info()[1], torch.cuda.memory_allocated(), "GPU memory")
    page = os.sysconf("SC_PAGE_SIZE")
    there = page * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" without a limit
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    mapped, resident = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        mapped, resident = (int(pages) * page for pages in Path("/proc/self/statm").read_text().split()[:2])
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < there:
        return Memory(limit, mapped, "address space (ulimit -v)")
    return Memory(there, resident, "memory")


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether `error`, an exception or what a program said, means that memory ran out: on the CPU, the GPU or in Python."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in SIGNS)


@contextlib.contextmanager
def short_of_memory(advice: str) -> Iterator[None]:
    """Raises OutOfMemory, with what is there and `advice`, when memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory: {memory().line()}; {advice}") from None
