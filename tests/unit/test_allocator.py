"""What was freed goes back to the system."""

from __future__ import annotations

import platform
import threading

import psutil
import pytest
import torch

from swarm.allocator import return_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators cannot be told")
def test_freed_memory_between_used_memory_goes_back():
    rss = psutil.Process().memory_info

    def work() -> None:  # in a thread, as a node loads; each piece is too small to get memory of its own
        pieces = [torch.ones(16_000) for _ in range(2000)]
        kept.extend(pieces[::100])

    kept: list[torch.Tensor] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = rss().rss
    return_freed_memory()
    assert before - rss().rss > 64e6, "of 128 MB that were freed"
    assert all(bool((piece == 1).all()) for piece in kept)
