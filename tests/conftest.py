"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fork_server import ForkServer


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Forks into our programs; one for each pytest process."""
    server = ForkServer()
    yield server
    running = server.running()
    server.close()
    assert running == [], "a test left these forks"
