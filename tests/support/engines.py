"""An engine with tiny blocks, and sessions on it as a node has them, in batches that are computed when a test says so.

The oracle is SpanModel.forward with a SpanCache, on each row's real tokens without padding. In fp32 batches are the same sums in
another order, and attention is another kernel: errors of a few units in the last place (6e-8) of a row's few dozen tokens and three
blocks; up to 2e-7 of the largest value were seen. TOLERANCE allows 1e-5; a token that sees one too many or too few is off by 1e-2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from node.admission import admit_step, finish_step, open_session
from node.backend.span_model import SpanModel
from node.backend.step_engine import EngineStep, StepEngine
from node.kv_cache import PAGE_TOKENS, SessionLimits, SessionTable
from node.session import Session
from node.step_queue import BatchLimits, StepQueue, Waiting
from protos import node_pb2
from swarm.checkpoint import open_checkpoint
from swarm.span import Span
from tests.support.models import save_tiny

SPAN = Span(1, 4)
HIDDEN = 32
NUM_PAGES = 28
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StepEngine]]:
    """One engine for each family, with pages full of what earlier tests left there. Import the fixture by name to use it."""
    folder = tmp_path_factory.mktemp("engines")

    class Engines(dict[str, StepEngine]):
        def __missing__(self, family: str) -> StepEngine:
            checkpoint = open_checkpoint(str(save_tiny(family, folder / family)), progress=False)
            self[family] = StepEngine(SpanModel(checkpoint, SPAN), num_pages=NUM_PAGES, page_tokens=PAGE_TOKENS)
            return self[family]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engines()
    torch.set_num_threads(threads)


@dataclass(eq=False)
class Client:
    """A session's other side: what its rows hold, and what must come out."""

    session: Session
    rows: list[list[Tensor | None]]
    """Hidden states of each column; None for padding."""
    step: EngineStep | None = None
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


class Node:
    """Sessions on an engine, as NodeService has them; batches are computed when the test says so."""

    def __init__(self, engine: StepEngine, limits: BatchLimits | None = None, num_pages: int = NUM_PAGES) -> None:
        self.engine, self.model = engine, engine.model
        self.table = SessionTable(
            SessionLimits(cache_bytes=num_pages * PAGE_TOKENS, max_sessions=99, max_sessions_per_peer=99, idle_s=9), 1
        )
        self.queue: StepQueue[EngineStep] = StepQueue(
            limits or BatchLimits(chunk_tokens=24, max_tokens=64), together=engine.computes_together
        )
        self.waiting: dict[int, Client] = {}
        self.num_batches = self.num_batched = self.num_found = 0
        self._ids = itertools.count()

    def open(self, hop: Span = SPAN, batch: int = 1, peer: str = "a") -> Client:
        session_id = next(self._ids).to_bytes(16, "big")
        request = node_pb2.OpenSession(session_id=session_id, batch=batch, max_length=10_000)
        session = open_session(self.table, self.engine, hop, peer, request, 0.0)
        return Client(session, [[] for _ in range(batch)])

    def send(
        self,
        client: Client,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        rewind_to: int | None = None,
        reorder: Sequence[int] = (),
    ) -> None:
        """Admit a step. Raises Refused, and nothing has changed."""
        session = client.session
        kept = session.num_tokens if rewind_to is None else rewind_to
        request = node_pb2.Step(position=kept, rewind_to=rewind_to, reorder=reorder)
        tensors = [hidden] if mask is None else [hidden, mask]
        step = admit_step(self.table, session, request, tensors, HIDDEN, self.model.dtype)
        rows = [client.rows[source][:kept] for source in (reorder or range(len(client.rows)))]
        for index, row in enumerate(rows):
            row += [
                token if mask is None or bool(mask[index, column]) else None
                for column, token in enumerate(hidden[index])
            ]
        client.rows, client.step = rows, step
        self.num_found += sum(growth.found for growth in step.growths)
        self.waiting[id(step)] = client
        self.queue.add(Waiting(step, session.peer_id, session.hop, step.num_tokens))

    def run_batch(self) -> list[Client]:
        """Compute the next batch. Those whose steps are done with it, checked."""
        batch = self.queue.next_batch()
        self.engine.compute(batch)
        self.num_batches, self.num_batched = self.num_batches + 1, self.num_batched + len(batch)
        done = [self.waiting.pop(id(step)) for step, _ in batch if step.num_done == step.num_tokens]
        for client in done:
            self.finish(client)
        return done

    def run_all(self) -> None:
        while self.waiting:
            self.run_batch()

    def finish(self, client: Client) -> None:
        assert client.step is not None and client.step.output is not None
        client.outputs, client.step = client.step.output, None
        finish_step(self.table, client.session, 0.0)
        self.assert_right(client)

    def step(self, client: Client, hidden: Tensor, mask: Tensor | None = None, **changes: Any) -> Tensor:
        """A step in batches with whatever waits. Its output, checked."""
        self.send(client, hidden, mask, **changes)
        while client.step is not None:
            self.run_batch()
        return client.outputs

    def cancel(self, client: Client) -> None:
        """The peer is gone, with or without a step under way."""
        if client.step is not None:
            self.queue.discard(client.step)
            del self.waiting[id(client.step)]
        self.table.close(client.session)

    def assert_right(self, client: Client) -> None:
        num_new = client.outputs.shape[1]
        for row, output in zip(client.rows, client.outputs, strict=True):
            real = [token for token in row if token is not None]
            is_new = torch.tensor([token is not None for token in row[-num_new:]])
            if self.engine.computes_together:
                assert not output[~is_new].any()
            if is_new.any():
                expected = self.alone(client.session.hop, real)[-int(is_new.sum()) :]
                assert_close(output[is_new], expected)

    def alone(self, hop: Span, tokens: Sequence[Tensor]) -> Tensor:
        """What a row gives in a session of its own, [tokens, H]."""
        return self.model.forward(torch.stack(list(tokens))[None], self.model.new_cache(hop))[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
