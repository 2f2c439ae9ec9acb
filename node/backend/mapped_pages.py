"""MappedPages: memory that shows files of weights, so that a process that loads them never has much more than what it keeps."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +\S.*")  # with an inode: a file's


class MappedPages:
    """Of the files that are mapped now. On systems without /proc none are known, and nothing is given back.

    Another process could have such memory any time, but it counts as this one's, up to the size of all weights.
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

        Also while other tensors of the file are in use. Returns the number of bytes. Tensors that are no file's stay as they are.
        """
        dropped = 0
        for tensor in tensors:
            if tensor.is_contiguous() and self.shows(tensor):
                start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
                size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
                if size > 0:
                    address = ctypes.c_void_p(start), ctypes.c_size_t(size)
                    dropped += size if ctypes.CDLL(None).madvise(*address, mmap.MADV_DONTNEED) == 0 else 0
        return dropped

    def shows(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is a file's."""
        if tensor.device.type != "cpu" or tensor.is_mkldnn or tensor.nbytes == 0:
            return False
        place = tensor.data_ptr()
        return any(start <= place and place + tensor.nbytes <= end for start, end in self._files)
