"""StepEngine: whoever shares a batch, each session gets what the model computes for it alone."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.backend.span_model import SpanModel
from node.backend.step_engine import StepEngine
from node.kv_cache import PAGE_TOKENS
from node.step_queue import BatchLimits
from swarm.checkpoint import open_checkpoint
from swarm.messages import Refused
from swarm.span import Span
from tests.support.engines import HIDDEN, NUM_PAGES, SPAN, Client, Node, engines
from tests.support.models import save_tiny

__all__ = ["engines"]

HOPS = (SPAN, SPAN, SPAN, Span(1, 3), Span(3, 4))
TOGETHER = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")
ALONE = ("bloom",)
# What sessions are sent: few texts, so that many begin with the same.
TEXTS = torch.randn(2, 160, HIDDEN, generator=torch.Generator().manual_seed(1))


class RandomClients:
    """Do what clients may do, at random: a schedule is a seed."""

    def __init__(self, node: Node, dice: random.Random) -> None:
        self.node, self.dice = node, dice
        self.clients: list[Client] = []
        self.num_refused = 0

    def act(self) -> None:
        idle = [client for client in self.clients if client.step is None]
        action = self.dice.random()
        if len(self.clients) < 6 and (action < 0.1 or len(self.clients) < 3):
            peer = self.dice.choice("abc")
            self.clients.append(self.node.open(self.dice.choice(HOPS), self.dice.choice((1, 1, 2, 3)), peer))
        elif action < 0.75 and idle:
            self.send(self.dice.choice(idle))
        elif 0.75 <= action < 0.78:
            self.node.cancel(gone := self.dice.choice(self.clients))
            self.clients.remove(gone)
        elif self.node.waiting:
            self.node.run_batch()
        self.clients = [client for client in self.clients if self.node.table.is_open(client.session)]

    def send(self, client: Client) -> None:
        dice, rows = self.dice, client.rows
        changes: dict[str, Any] = {}
        length = len(rows[0])
        if length and dice.random() < 0.3:
            changes["rewind_to"] = dice.choice((0, length, dice.randrange(length)))
        if len(rows) > 1 and dice.random() < 0.4:
            changes["reorder"] = [dice.randrange(len(rows)) for _ in rows]
        kept = changes.get("rewind_to", length)
        num_new = dice.choice((1, 1, 1, 2, 15, 16, 17, 40)) if length else dice.choice((3, 16, 33, 50))
        mask = None
        if kept == 0 and dice.random() < 0.4:
            mask = torch.ones(len(rows), num_new, dtype=torch.bool)
            for row in mask[:-1]:
                row[: dice.choice((0, 1, num_new // 2, num_new - 1, num_new))] = False
        # Each row goes on with the text that it is in, at its own place, or with a token that nobody else has.
        text = TEXTS[dice.randrange(len(TEXTS))]
        hidden = torch.empty(len(rows), num_new, HIDDEN)
        for index, source in enumerate(changes.get("reorder", range(len(rows)))):
            start = sum(token is not None for token in rows[source][:kept])
            for column in range(num_new):
                is_padding = mask is not None and not mask[index, column]
                hidden[index, column] = 99.0 if is_padding else text[start % len(text)]
                start += not is_padding
        if dice.random() < 0.2:
            hidden[:, -1] = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(dice.randrange(99)))
        try:
            self.node.send(client, hidden, mask, **changes)
        except Refused:
            self.num_refused += 1


@pytest.mark.parametrize("family", [*TOGETHER, *ALONE])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_under_random_schedules_each_session_gets_what_it_gets_alone(
    family: str, engines: dict[str, StepEngine], seed: int
) -> None:
    assert engines[family].computes_together == (family in TOGETHER), engines[family].reason
    node = Node(engines[family])
    clients = RandomClients(node, random.Random(seed))
    for _ in range(80):
        clients.act()
    node.run_all()
    for client in clients.clients:
        node.table.close(client.session)
    assert node.table.pool.num_held == 0 and node.table.empty.is_set()


def text(num_tokens: int, seed: int = 7) -> torch.Tensor:
    """[1, tokens, H]."""
    return torch.randn(1, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def wait_together(node: Node, *clients: Client) -> None:
    """Compute what waits, which must be these steps in one batch."""
    assert set(node.run_batch()) == set(clients)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_an_equal_prompt_is_found_on_every_hop_and_its_outputs_are_bit_equal(
    family: str, engines: dict[str, StepEngine]
) -> None:
    """What the second hop is sent is what came out of the first: bit-equal, or it would find nothing."""
    node, prompt = Node(engines[family]), text(50)
    first, second = ([node.open(hop) for hop in (Span(1, 3), Span(3, 4))] for _ in range(2))
    neighbour = node.open(Span(1, 3))
    through_first: list[list[torch.Tensor]] = [[], []]
    for piece in prompt.split((20, 30), dim=1):  # in pieces, beside others: the second one's batches are not like these
        node.send(neighbour, text(3, seed=1))
        for hop, client in enumerate(first):
            piece = node.step(client, piece)
            through_first[hop].append(piece)
    assert node.num_found == 0
    hidden = prompt
    for client, pieces in zip(second, through_first, strict=True):
        hidden = node.step(client, hidden)
        assert torch.equal(hidden[:, :48], torch.cat(pieces, dim=1)[:, :48])
    assert node.num_found == 2 * 48
    for client in (*first, *second):  # and both go on, each with its own
        node.step(client, text(5, seed=id(client) % 99))


def test_a_found_prompt_outlives_who_sent_it_and_is_copied_when_it_is_changed(engines: dict[str, StepEngine]) -> None:
    node, prompt = Node(engines["llama"]), text(32)
    first = node.open()
    expected = node.step(first, prompt)
    node.cancel(first)
    others = [node.open(), node.open(batch=2)]
    assert torch.equal(node.step(others[0], prompt), expected)
    assert torch.equal(node.step(others[1], prompt.expand(2, -1, -1)), expected.expand(2, -1, -1))
    assert node.num_found == 3 * 32 and node.table.pool.num_held == 2
    for client in others:
        node.send(client, text(3).expand(client.session.batch, -1, -1), rewind_to=20)
    wait_together(node, *others)
    assert torch.equal(node.step(node.open(), prompt), expected), "they wrote into copies"


def test_a_page_that_was_copied_half_full_is_found_whole(engines: dict[str, StepEngine]) -> None:
    """With what came out of the hop for its first half, too."""
    node, prompt = Node(engines["llama"]), text(32)
    beams = node.open(batch=2)
    other = text(20, seed=8)
    first = node.step(beams, torch.cat([other, prompt[:, :20]]))
    second = node.step(beams, prompt[:, 20:].expand(2, -1, -1), reorder=[1, 1])
    assert len(beams.session.pages.table(0)) == 2 and node.table.pool.num_held == 3
    node.cancel(beams)
    assert torch.equal(node.step(node.open(), prompt), torch.cat([first[1:], second[:1]], dim=1))
    assert node.num_found == 32


def test_a_prompt_is_found_whatever_padding_is_before_it(engines: dict[str, StepEngine]) -> None:
    node, prompt = Node(engines["llama"]), text(20)
    expected = node.step(node.open(), prompt)
    padded = node.open(batch=2)
    mask = torch.tensor([[False] * 7 + [True] * 20, [True] * 27])
    output = node.step(padded, torch.stack([torch.cat([text(7), prompt], dim=1)[0], text(27, seed=9)[0]]), mask)
    assert node.num_found == 16 and torch.equal(output[:1, 7:23], expected[:, :16])


def test_a_row_may_be_rewound_into_its_padding(engines: dict[str, StepEngine]) -> None:
    node = Node(engines["llama"])
    client = node.open(batch=2)
    mask = torch.tensor([[False] * 10 + [True] * 5, [True] * 15])
    node.step(client, text(15).expand(2, -1, -1), mask)
    node.step(client, text(8, seed=2).expand(2, -1, -1), rewind_to=4)
    node.step(client, text(3, seed=3).expand(2, -1, -1), rewind_to=8)
    assert client.session.pages.lengths == [7, 11]


def test_a_prompt_that_is_under_way_is_not_found_before_it_is_computed(engines: dict[str, StepEngine]) -> None:
    node, prompt = Node(engines["llama"], BatchLimits(chunk_tokens=16)), text(48)
    first, second = node.open(peer="a"), node.open(peer="b")
    node.send(first, prompt)
    node.run_batch()
    node.send(second, prompt)
    assert node.num_found == 0
    node.run_all()


@pytest.mark.parametrize("family", TOGETHER)
def test_nobody_notices_that_another_overflows(family: str, engines: dict[str, StepEngine]) -> None:
    """Admission lets no NaN in, but blocks may overflow. It is in the same batch, and in pages that others get later."""
    node = Node(engines[family])
    mine, other = node.open(), node.open()
    node.step(mine, text(20, seed=3))
    hidden = text(8)
    node.send(other, hidden)
    hidden.fill_(float("nan"))
    node.send(mine, text(5, seed=4))
    batch = node.queue.next_batch()
    node.engine.compute(batch)
    assert len(batch) == 2
    assert other.step is not None and other.step.output is not None and other.step.output.isnan().all()
    node.finish(mine)
    node.cancel(other)
    node.step(node.open(), text(33, seed=5))


def test_a_step_of_padding_alone_gives_zeros_and_takes_no_room(engines: dict[str, StepEngine]) -> None:
    node = Node(engines["llama"])
    client = node.open(batch=2)
    mask = torch.tensor([[False] * 20, [True] * 20])
    output = node.step(client, text(20).expand(2, -1, -1), mask)
    assert not output[0].any() and output[1].any() and node.table.pool.num_held == 2
    node.step(client, text(3).expand(2, -1, -1))


def test_the_memory_of_the_pages_is_the_budget_whatever_parts_of_the_span_are_asked_for(tmp_path: Any) -> None:
    """And so is the number of blocks that are traced: a trace takes memory, too, and peers may ask for any part."""
    checkpoint = open_checkpoint(str(save_tiny("llama", tmp_path / "model")), progress=False)
    model = SpanModel(checkpoint, Span(0, 4))
    num_pages = NUM_PAGES + 1  # as no other test has
    engine = StepEngine(model, num_pages=num_pages, page_tokens=PAGE_TOKENS)
    node = Node(engine)
    hops = [Span(start, end) for start in range(4) for end in range(start + 1, 5)]
    for hop in hops:
        client = node.open(hop)
        for _ in range(33):
            node.step(client, text(1))
        node.cancel(client)
    slots = num_pages * PAGE_TOKENS
    tensors = [tensor for pair in engine._store._blocks.values() for tensor in pair] + [engine._store.outputs]
    owned = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.shape[:1] == (slots,)]
    assert {id(tensor) for tensor in owned} == {id(tensor) for tensor in tensors}
    per_token = model.cache_bytes_per_token() * 4 + HIDDEN * 4
    assert sum(tensor.nbytes for tensor in tensors) == per_token * slots
    assert engine.ragged is not None
    assert 4 < sum(len(hop) for hop in engine.ragged._traced) <= 8
