"""How tasks are brought to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended, however they do."""
    pending = set(tasks)
    while pending:  # Python 3.11's wait_for, inside hivemind, may swallow a cancellation: ask again
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.5)
