"""OpenMP's threads in our own programs: how long they spin before they sleep. To be said before torch is imported."""

from __future__ import annotations

import os


def spin_shortly() -> None:
    """Let threads that wait for work spin for some 20 microseconds, unless the environment says otherwise.

    Those that spin for longer take the cores from the other processes of the machine, which made all of them ten times slower; those that
    sleep at once are woken for each of a step's hundreds of operators, which takes half as long again (docs/log.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
