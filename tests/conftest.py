"""What all tests share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from swarm.light_start import leave_out
from tests.support.fork_server import ForkServer

leave_out()  # as our programs do; the examples are run as users do, who have the libraries whole
gc.disable()  # until all is imported: there is no garbage yet, and looking for it takes a quarter of that time

# How long an example takes says nothing on a machine that others use, too.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; our programs would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays
    gc.enable()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Forks into our programs; one for each pytest process."""
    server = ForkServer()
    yield server
    running = server.running()
    server.close()
    assert running == [], "a test left these forks"
