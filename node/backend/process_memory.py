"""What a process gives back of its memory while it loads weights, so that at no time it has much more than those that it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +\S.*")  # with an inode: a file's


class MappedPages:
    """Memory that shows files, given back when it has been read, though other tensors of the file are in use.

    Another process could have it any time, but it counts as this one's, up to the size of all weights. These are the files that are
    mapped now; on systems without /proc nothing is given back.
    """

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            lines = []
        found = (_LINE.fullmatch(line) for line in lines)
        self._files = [(int(match[1], 16), int(match[2], 16)) for match in found if match]

    def drop(self, tensors: Iterable[Tensor]) -> int:
        """Give back the pages that show nothing but these tensors, which nobody has written into; they can still be read.

        Returns the number of bytes. Tensors that are no file's stay as they are.
        """
        dropped = 0
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.is_mkldnn or not tensor.is_contiguous():
                continue
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end and any(first <= start and end <= last for first, last in self._files):
                result = ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
                )
                dropped += (end - start) if result == 0 else 0
        return dropped


def trim_heap() -> None:
    """Give back what was freed between things that are still in use: up to a third of the weights' size. Only with glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
