"""A facade for code without an event loop: the client runs in a thread of its own, and calls wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.client.config import ClientConfig
from swarm.client.connect import SwarmClient, open_swarm
from swarm.client.session import Session

if TYPE_CHECKING:
    from swarm.client.classify import SwarmModelForSequenceClassification
    from swarm.client.model import SwarmModelForCausalLM

T = TypeVar("T")


class LoopThread:
    """A thread that runs an event loop until close()."""

    def __init__(self) -> None:
        import uvloop

        self.loop = uvloop.new_event_loop()
        # A daemon, so that a forgotten close() cannot keep the interpreter alive; the finalizer below ends it properly.
        self._thread = threading.Thread(target=self.loop.run_forever, name="swarm", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return its result. An interrupt (Ctrl-C) cancels it first."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if not self.loop.is_closed():
            self.run(_end_other_tasks())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _end_other_tasks() -> None:
    """hivemind leaves tasks of its own behind; a loop that closes over them says so on stderr."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=5)


class Swarm:
    """Connected to a swarm, for one model. Use as a context manager, or call close()."""

    def __init__(self, config: ClientConfig) -> None:
        self._thread = LoopThread()
        self._closing = asyncio.Event()
        try:
            self.client = self._thread.run(self._open(config))
        except BaseException:
            self._thread.close()
            raise
        self._finalizer = weakref.finalize(self, _close, self._thread, self._closing, self._lifetime)
        self._model: SwarmModelForCausalLM | None = None

    async def _open(self, config: ClientConfig) -> SwarmClient:
        """Enter open_swarm in a task that also leaves it, at close()."""
        opened: asyncio.Future[SwarmClient] = asyncio.get_running_loop().create_future()

        async def live() -> None:
            try:
                async with open_swarm(config) as client:
                    opened.set_result(client)
                    await self._closing.wait()
            except BaseException as error:
                if opened.done():
                    raise
                opened.set_exception(error)

        self._lifetime = asyncio.create_task(live())
        try:
            return await opened
        except BaseException:
            self._lifetime.cancel()
            await asyncio.wait([self._lifetime])
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the async API on the client's loop."""
        return self._thread.run(coroutine)

    def is_outdated(self) -> bool:
        """Of a run that is served while it is trained: whether there are newer weights."""
        from swarm.client.run_client import is_outdated
        from swarm.training.run_model import RunModel

        checkpoint = self.client.checkpoint
        return isinstance(checkpoint, RunModel) and self.run(is_outdated(self.client.directory, checkpoint))

    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers)."""
        return self.client.checkpoint.tokenizer()

    def model(self) -> SwarmModelForCausalLM:
        """The model, as a transformers PreTrainedModel whose blocks are in the swarm."""
        from swarm.client.model import SwarmModelForCausalLM

        if self._model is None:
            self._model = SwarmModelForCausalLM.of(self)
        return self._model

    def classifier(self, num_labels: int = 2, **options: Any) -> SwarmModelForSequenceClassification:
        """The model with a new classification head in the place of its own. options: further fields of its config.

        The ends, which it shares with model(), are frozen by this.
        """
        from swarm.client.classify import SwarmModelForSequenceClassification

        return SwarmModelForSequenceClassification.of(self, num_labels=num_labels, **options)

    def session(self, *, batch: int = 1, max_length: int) -> Session:
        """An opened session of the async API. Close it with run(session.aclose())."""
        return self.run(self.client.session(batch=batch, max_length=max_length).__aenter__())

    def close(self) -> None:
        """Leave the swarm. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(thread: LoopThread, closing: asyncio.Event, lifetime: asyncio.Task[None]) -> None:
    async def leave() -> None:
        closing.set()
        await asyncio.wait([lifetime], timeout=10)

    with contextlib.suppress(asyncio.CancelledError):
        thread.run(leave())
    thread.close()
