"""A process that hosts several runs: the end of one is not that of the others, and lines of the log say which they are of."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from node.training.runtime import _until_over, _until_ready
from node.training.service import StageServices
from swarm.errors import UserError
from swarm.log_label import LabelFilter, log_label


class Part:
    """What stands for HostedRun here."""

    def __init__(self, name: bytes) -> None:
        self.store = SimpleNamespace(run_id=name * 32)
        self.is_ready = asyncio.Event()
        self.stop = asyncio.Event()
        self.failure: BaseException | None = None

    async def take_part(self) -> None:
        await self.stop.wait()
        if self.failure is not None:
            raise self.failure

    def end(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.stop.set()


def begin() -> tuple[Part, Part, dict[Any, Any]]:
    one, other = Part(b"1"), Part(b"2")
    return one, other, {asyncio.create_task(part.take_part()): part for part in (one, other)}


async def test_a_run_that_cannot_go_on_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    one, other, parts = begin()
    died = asyncio.create_task(asyncio.Event().wait())
    over = asyncio.create_task(_until_over(parts, died))
    one.end(UserError("no replica gave its state"))
    while "no replica gave its state" not in caplog.text:
        await asyncio.sleep(0)
    assert "run ended here run=31313131" in caplog.text and not over.done()
    other.end()
    await over
    died.cancel()


async def test_the_failure_of_the_last_run_is_that_of_the_process() -> None:
    one, other, parts = begin()
    died = asyncio.create_task(asyncio.Event().wait())
    other.end()
    one.end(UserError("no replica gave its state"))
    with pytest.raises(UserError, match="no replica"):
        await _until_over({task: part for task, part in parts.items() if part is one}, died)
    died.cancel()


async def test_a_bug_and_the_death_of_the_network_daemon_end_all() -> None:
    one, _, parts = begin()
    died = asyncio.create_task(asyncio.sleep(0))
    with pytest.raises(UserError, match="p2pd"):
        await _until_over(parts, died)
    one.end(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await _until_over(parts, asyncio.create_task(asyncio.Event().wait()))


async def test_what_keeps_a_run_from_its_begin_is_raised() -> None:
    one, other, parts = begin()
    one.is_ready.set()
    other.end(UserError("the folder cannot be read"))
    with pytest.raises(UserError, match="the folder"):
        await _until_ready(parts)


async def test_a_stream_goes_to_the_run_that_it_is_for_and_else_to_the_first() -> None:
    served: list[tuple[str, bytes]] = []

    class Service:
        def __init__(self, name: str) -> None:
            self.name = name

        def is_meant(self, first: bytes) -> bool:
            return first == self.name.encode()

        async def handle(self, stream: Any, first: bytes) -> None:
            served.append((self.name, first))

    class Stream:
        def __init__(self, first: bytes | None) -> None:
            self.first = first

        async def receive(self) -> bytes | None:
            return self.first

    services = StageServices([Service("one"), Service("other")])  # type: ignore[list-item]
    for first in (b"other", b"one", b"neither", None):
        await services.handle(Stream(first))  # type: ignore[arg-type]
    assert served == [("other", b"other"), ("one", b"one"), ("one", b"neither")]


async def test_the_label_of_a_task_is_that_of_what_it_starts_and_of_nothing_else() -> None:
    def label() -> str:
        record = logging.LogRecord("x", logging.INFO, "", 0, "", None, None)
        assert LabelFilter().filter(record)
        return str(record.label)  # type: ignore[attr-defined]

    async def work() -> list[str]:
        log_label.set("run=ab ")

        async def inner() -> str:
            return label()

        return [await asyncio.create_task(inner()), await asyncio.to_thread(label)]

    assert await asyncio.create_task(work()) == ["run=ab "] * 2
    assert label() == ""
