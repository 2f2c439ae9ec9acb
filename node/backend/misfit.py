"""Why the blocks of a family cannot be served in spans: found out by trying, since nothing here knows any family.

H hidden size. One row of a few random tokens goes through the span, and then through each block alone, as if it were a hop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from node.backend.span_cache import SpanCache
from swarm.span import Span

if TYPE_CHECKING:
    from node.backend.span_model import SpanModel

NUM_TOKENS = 8
PREFILL = 3
"""Tokens of the first of two steps."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What went into a block in one forward, and what came out: [1, NUM_TOKENS, H], and all other tensors on both sides."""

    given: Tensor
    output: Tensor
    others_given: Sequence[Tensor]
    others_returned: Sequence[Tensor]


def probe_of(model: SpanModel) -> Tensor:
    """Random hidden states [1, NUM_TOKENS, H]: small, as embeddings are, so that what a block adds is not lost beside them in bf16."""
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(1, NUM_TOKENS, model.hidden_size, generator=generator)).to(model.dtype)


def trace(model: SpanModel, blocks: Sequence[nn.Module], hidden: Tensor) -> tuple[list[Passage], Tensor, SpanCache]:
    """One forward through the span: what passed each of its blocks, what came out, and the cache."""
    entered: list[Tensor] = []
    seen: list[Passage] = []

    def enter(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        entered.append((args[0] if args else options["hidden_states"]).clone())  # it may be changed in place

    def leave(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        given = args[0] if args else options["hidden_states"]
        others = [tensor for tensor in _tensors_in([args, options]) if tensor is not given]
        first, *rest = _tensors_in(output)
        seen.append(Passage(entered[-1].to("cpu"), first.to("cpu"), others, rest))

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave, with_kwargs=True) for block in blocks]
    cache = model.new_cache(model.span)
    try:
        output = model.forward(hidden, cache)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, output, cache


def find_misfit(model: SpanModel, blocks: Sequence[nn.Module], probe: Tensor) -> str | None:
    """Why these blocks, run one after another on nothing but hidden states, are not the model; None if they are."""
    passages, output, cache = trace(model, blocks, probe)
    if not all(same(one.output, next_.given) for one, next_ in pairwise(passages)):
        return "it computes something between its blocks"
    if not same(output, passages[-1].output):
        return "it computes something after its blocks that cannot be cut off"
    if not cache.is_complete:
        return "its blocks do not keep keys and values of their own for every token"
    changed = probe.clone()
    changed[:, -1] *= -2
    others, other_output, _ = trace(model, blocks, changed)
    if not all(
        _all_same(one.others_given, other.others_given) for one, other in zip(passages, others, strict=True)
    ):
        return "its blocks read more of what is before them than the hidden states of the last one"
    if not all(
        _all_same(one.others_returned, other.others_returned) for one, other in zip(passages, others, strict=True)
    ):
        return "its blocks hand on more than hidden states"
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    # Not bit-equal where experts get other batches, and in bf16 a token may then go to other experts; but not every token.
    errors = _errors(other_output, output)[:-1]
    if float(errors.max() if model.dtype == torch.float32 else errors.min()) > tolerance:
        return "its tokens depend on later ones"
    for index, passage in zip(model.span, passages, strict=True):
        misfit = _find_misfit_alone(model, Span(index, index + 1), passage, tolerance)
        if misfit is not None:
            return misfit
    return None


def _find_misfit_alone(model: SpanModel, hop: Span, passage: Passage, tolerance: float) -> str | None:
    """Give a block alone what it was given in the span, in two steps, and in a second row moved by one token of padding."""
    given, expected = passage.given, passage.output
    rows = torch.cat([given, torch.cat([-given[:, -1:], given[:, :-1]], dim=1)])
    mask = torch.ones(2, NUM_TOKENS, dtype=torch.bool)
    mask[1, 0] = False
    cache = model.new_cache(hop)
    steps = [model.forward(rows[:, a:b], cache, mask=mask[:, a:b]) for a, b in ((0, PREFILL), (PREFILL, NUM_TOKENS))]
    output = torch.cat(steps, dim=1)
    plain, padded = _errors(output[:1], expected), _errors(output[1:, 1:], expected[:, :-1])
    if _is_off([plain[:PREFILL], plain[PREFILL:]], tolerance):
        return "its blocks alone, given tokens in steps, compute something else than at once"
    if _is_off([padded[: PREFILL - 1], padded[PREFILL - 1 :]], tolerance):
        return "its blocks compute something else for a text beside padding"
    return None


def _errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Of each token, the largest difference in units of the largest expected value: float [tokens]."""
    difference = (actual.float() - expected.float()).abs().amax(dim=2)[0]
    return difference / expected.float().abs().max()


def _is_off(steps: Sequence[Tensor], tolerance: float) -> bool:
    """Whether a step has no token that is right: a single one may differ for going to another expert at a near tie."""
    return any(float(errors.min()) > tolerance for errors in steps)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers; caches are none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _all_same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; broken weights (NaN) are for the caller of SpanModel to find."""
    return one is other or (one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num()))
