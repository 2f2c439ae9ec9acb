"""One of our programs in a network namespace, as `ip netns exec` runs it, but from a fork server, too.

python -m tests.support.in_namespace NAME MODULE ARGUMENTS...
"""

from __future__ import annotations

import ctypes
import runpy
import sys


def enter(name: str) -> None:
    """Move this thread, and what it starts, to a network namespace. Before anything has a socket."""
    with open(f"/run/netns/{name}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0


if __name__ == "__main__":
    enter(sys.argv[1])
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
