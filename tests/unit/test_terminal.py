"""Progress bars: seen on a terminal, silent in a pipe, and nothing is left behind."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys

CODE = """
from swarm.terminal import ProgressBar, bar_class
with ProgressBar("loading weights", 100) as bar:
    for _ in range(4):
        bar.advance(20)
    bar.reach(100)
with bar_class("downloading x")(total=10, desc="theirs", unit="B", unit_scale=True) as bar:
    bar.update(10)
"""


def run(stderr: int) -> str:
    done = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=30)
    assert done.returncode == 0
    return done.stdout


def test_a_terminal_sees_bars_and_none_stays() -> None:
    """Also on a terminal that says it has no columns, as this one does."""
    ours, theirs = pty.openpty()
    try:
        assert run(theirs) == ""
        assert select.select([ours], [], [], 5.0)[0], "nothing was drawn"
        drawn = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "loading weights" in drawn and "downloading x" in drawn and "theirs" not in drawn
    assert drawn.rpartition("\r")[2] == ""


def test_a_pipe_sees_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == ("", "")
