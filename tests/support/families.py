"""Families: a tiny model of any type that transformers has, cut into ends and shards, compared with the same model whole.

Tolerance: 1e-5 of the largest logit, in fp32. Cutting changes no operation, so a whole forward is equal to the bit or nearly; but
matrix products of one token and of twenty add up in another order, and four blocks and the head make some 1e-6 of that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from node.backend.page_store import RowPart
from node.backend.ragged import NotRagged
from node.backend.ragged_span import RaggedSpan
from node.backend.span_model import SpanModel
from swarm.checkpoint import open_checkpoint
from swarm.ends import Ends
from swarm.span import Span

TOLERANCE = 1e-5
NUM_TOKENS = 20
"""More than two windows of the families whose attention slides."""
PADDINGS = {"none": slice(0), "left": slice(0, 7), "right": slice(15, NUM_TOKENS)}

Shards = Mapping[Span, Sequence[Span]]
"""The shards that cover a model, and the hops that each serves."""


class Cut:
    """A model cut into ends and shards, each of which serves some hops."""

    def __init__(self, path: Path, shards: Shards, dtype: torch.dtype = torch.float32) -> None:
        checkpoint = open_checkpoint(str(path), progress=False)
        self.ends = Ends(checkpoint, dtype=dtype)
        models = {span: SpanModel(checkpoint, span, dtype=dtype) for span in shards}
        self.hops = [(models[span], hop) for span, hops in shards.items() for hop in hops]

    def session(self) -> Session:
        return Session(self.ends, self.hops)


class Session:
    """A generation through some hops, as a client leads it."""

    def __init__(self, ends: Ends, hops: Sequence[tuple[SpanModel, Span]]) -> None:
        self.ends, self.hops = ends, hops
        self.caches = [model.new_cache(hop) for model, hop in hops]

    @torch.inference_mode()
    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for new tokens; mask: bool over all tokens so far."""
        past = self.caches[0].num_tokens
        hidden = self.ends.embed(ids, position=past, mask=mask)
        new_mask = None if mask is None else mask[:, past:]
        for (model, _), cache in zip(self.hops, self.caches, strict=True):
            hidden = model.forward(hidden, cache, mask=new_mask)
        return self.ends.logits(hidden)

    def rewind(self, position: int) -> None:
        for cache in self.caches:
            cache.rewind(position)

    def reorder(self, *rows: int) -> None:
        for cache in self.caches:
            cache.reorder(torch.tensor(rows))


class Whole:
    """The model that transformers loads from the same folder, and two rows of tokens for it."""

    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.ids = torch.randint(3, 250, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool [B, T]; positions then count the real tokens, as in generate()."""
        if mask is None:
            return self.model(ids).logits
        options = {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)} if self.takes_positions else {}
        return self.model(ids, attention_mask=mask.long(), **options).logits

    def embeds(self) -> Tensor:
        return self.model.get_input_embeddings()(self.ids).detach()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def check_basics(whole: Whole, cut: Cut) -> None:
    """Inference and training, for a model that another cut of was checked more."""
    check_forward_and_decode(whole, cut)
    check_gradients(whole, cut, "left")


def check_everything(whole: Whole, cut: Cut) -> None:
    """All the checks below, one after another."""
    check_forward_and_decode(whole, cut)
    check_padding(whole, cut)
    check_rewind_and_reorder(whole, cut)
    check_two_sessions(whole, cut)
    for padding in PADDINGS:
        check_gradients(whole, cut, padding)
    check_swapped_blocks_are_noticed(whole, cut)


def check_forward_and_decode(whole: Whole, cut: Cut) -> None:
    """A whole forward, and a prompt with single tokens and some more after it."""
    expected = whole.logits(whole.ids)
    assert distance(cut.session().step(whole.ids), expected) < TOLERANCE
    session, pieces = cut.session(), [(0, 11), (11, 12), (12, 13), (13, 14), (14, NUM_TOKENS)]
    steps = [session.step(whole.ids[:, a:b]) for a, b in pieces]
    assert distance(torch.cat(steps, 1), expected) < TOLERANCE


def check_padding(whole: Whole, cut: Cut) -> None:
    """Padding on the left: whole, in steps, after a rewind into the prompt, and with rows that changed places."""
    ids, mask = whole.ids, torch.ones_like(whole.ids, dtype=torch.bool)
    mask[0, :7] = False
    expected = whole.logits(ids, mask)[mask]
    assert distance(cut.session().step(ids, mask)[mask], expected) < TOLERANCE
    session = cut.session()
    pieces = [session.step(ids[:, a:b], mask[:, :b]) for a, b in [(0, 9), (9, 10), (10, NUM_TOKENS)]]
    assert distance(torch.cat(pieces, 1)[mask], expected) < TOLERANCE
    session.rewind(8)
    session.reorder(1, 0)
    ids, mask = torch.cat([ids[[1, 0], :8], ids[:, 8:]], 1), mask[[1, 0]]
    assert distance(session.step(ids[:, 8:], mask), whole.logits(ids, mask)[:, 8:]) < TOLERANCE


def check_rewind_and_reorder(whole: Whole, cut: Cut) -> None:
    """What is rewound or belonged to a row that a beam search dropped leaves no trace."""
    ids, session = whole.ids, cut.session()
    session.step(ids[:, :15])
    session.rewind(12)  # longer than the window of families whose attention slides
    session.reorder(1, 1)
    chosen = torch.cat([ids[[1, 1], :12], ids[:, 12:]], dim=1)
    assert distance(session.step(chosen[:, 12:]), whole.logits(chosen)[:, 12:]) < TOLERANCE
    session.rewind(0)
    assert distance(session.step(ids), whole.logits(ids)) < TOLERANCE


def check_two_sessions(whole: Whole, cut: Cut) -> None:
    """Two sessions on the same shards, in turn, at different positions."""
    ids = whole.ids
    expected = [whole.logits(ids[:1]), whole.logits(ids[1:, :14])]
    one, other = cut.session(), cut.session()
    first = [one.step(ids[:1, :10])]
    second = [other.step(ids[1:, :5])]
    for position in range(5, 9):
        first.append(one.step(ids[:1, position + 5 : position + 6]))
        second.append(other.step(ids[1:, position : position + 1]))
    first.append(one.step(ids[:1, 14:]))
    second.append(other.step(ids[1:, 9:14]))
    assert distance(torch.cat(first, 1), expected[0]) < TOLERANCE
    assert distance(torch.cat(second, 1), expected[1]) < TOLERANCE


def computes_together(whole: Whole, cut: Cut) -> bool:
    """Whether sessions on these shards are computed in ragged batches. If so, two of other lengths are, and checked."""
    try:
        ragged = {model: RaggedSpan(model) for model, _ in cut.hops}
    except NotRagged:
        return False
    stores = {model: span.new_store(10, 4) for model, span in ragged.items()}
    pages = [[0, 2, 4, 6, 8], [9, 7, 5, 3, 1]]
    pieces: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for steps in ([(0, 7), (0, 5)], [(7, 8), (5, 6)], [(8, 9), None], [(9, NUM_TOKENS), (6, 14)]):
            parts = [(row, *step) for row, step in enumerate(steps) if step is not None]
            hidden = torch.cat([cut.ends.embed(whole.ids[row : row + 1, a:b], position=a)[0] for row, a, b in parts])
            for model, hop in cut.hops:
                rows = [RowPart(pages[row], a, b - a) for row, a, b in parts]
                hidden = ragged[model].forward(hop, hidden, stores[model], rows)
            logits = torch.split(cut.ends.logits(hidden[None])[0], [b - a for _, a, b in parts])
            for (row, *_), piece in zip(parts, logits, strict=True):
                pieces[row].append(piece)
    for row, length in enumerate((NUM_TOKENS, 14)):
        assert distance(torch.cat(pieces[row])[None], whole.logits(whole.ids[row : row + 1, :length])) < TOLERANCE
    return True


def check_gradients(whole: Whole, cut: Cut, padding: str) -> None:
    """Loss, logits and the gradient w.r.t. the embeddings, with one of PADDINGS."""
    mask = None
    if padding != "none":
        mask = torch.ones_like(whole.ids, dtype=torch.bool)
        mask[0, PADDINGS[padding]] = False
    given = whole.embeds().requires_grad_()
    attention_mask = None if mask is None else mask.long()
    expected = whole.model(
        inputs_embeds=given.clone(), attention_mask=attention_mask
    ).logits  # ctrl changes it in place
    loss = loss_of(expected, mask)
    loss.backward()
    assert given.grad is not None
    real = mask if mask is not None else torch.ones_like(whole.ids, dtype=torch.bool)
    own_loss, logits, gradient = gradient_through(cut.ends, cut.hops, whole.embeds(), mask)
    assert float((own_loss - loss).detach().abs() / loss.detach().abs()) < TOLERANCE * 10
    assert distance(logits[real], expected[real]) < TOLERANCE
    assert distance(gradient, given.grad) < TOLERANCE


def check_swapped_blocks_are_noticed(whole: Whole, cut: Cut) -> None:
    """What all this is worth: it must see that two hops changed places, in logits and in gradients."""
    *first, before, last = cut.hops
    _, expected, expected_gradient = gradient_through(cut.ends, cut.hops, whole.embeds(), None)
    _, logits, gradient = gradient_through(cut.ends, [*first, last, before], whole.embeds(), None)
    assert distance(logits, expected) > 100 * TOLERANCE
    assert distance(gradient, expected_gradient) > 100 * TOLERANCE


def gradient_through(
    ends: Ends, hops: Sequence[tuple[SpanModel, Span]], embeds: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logits, gradient w.r.t. embeds) through the hops, each differentiated alone, as nodes do it."""
    given = embeds.clone().requires_grad_()
    embedded = ends.embed_whole(given, mask=mask)
    passed, kept = embedded.detach(), []
    for model, hop in hops:
        start, output, num_bytes = model.differentiable(hop, passed, mask=mask)
        assert num_bytes >= output.nbytes + start.nbytes
        kept.append((start, output))
        passed = output.detach()
    last = passed.requires_grad_()
    logits = ends.logits(last)
    loss = loss_of(logits, mask)
    (gradient,) = torch.autograd.grad(loss, last)
    for start, output in reversed(kept):
        (gradient,) = torch.autograd.grad(output, start, gradient)
    (gradient,) = torch.autograd.grad(embedded, given, gradient) if embedded is not given else (gradient,)
    return loss, logits, gradient


def loss_of(logits: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits * weights)[mask if mask is not None else ...].mean()
