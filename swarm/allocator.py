"""Allocator: what the process does not use any more goes back to the system, or is kept for the next time. Only glibc's can be told."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST, _NEVER = 2**31 - 1, -1


def return_freed_memory() -> None:
    """Give it back: 80 to 130 MB after a model was built and traced."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_one_arena() -> None:
    """Let all threads take memory from one place, which keep_freed_memory needs. To be called before there are other threads."""
    # A further arena has heaps of 64 MB at most: what is larger would come from the system each time.
    _tell({_M_ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """From now on keep freed tensors' memory, for a process that needs as much again with every microbatch.

    Otherwise the system takes large pieces back, and gives them out again page by page, each filled with zeros: a third of the time
    of a training step (docs/log.md). return_freed_memory still gives back what is free. To be called when all that lasts is loaded:
    products are slower by a fifth with weights that lie in the heap.
    """
    _tell({_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _NEVER})


def _tell(options: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)
