"""Why the blocks of a family cannot be served in spans: found out by trying, since nothing here knows any family.

H hidden size. One row of a few random tokens goes through the span, and then through each block alone, as if it were a hop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from node.backend.span_cache import SpanCache
from swarm.span import Span

if TYPE_CHECKING:
    from node.backend.span_model import SpanModel

Run = Callable[[Tensor], Tensor]
NUM_TOKENS = 7
PREFILL = 3
"""Tokens of the first of two steps."""

_INDEX_NAMES = ("idx", "index", "id")


@dataclass(frozen=True, slots=True)
class Passage:
    """What went into a block in one forward, and what came out: [1, NUM_TOKENS, H]; and all other tensors that it was given."""

    given: Tensor
    output: Tensor
    others: Sequence[Tensor]


Trace = tuple[list[Passage], Tensor]
"""What passed each block, and what came out in the end."""


def probe_of(model: SpanModel) -> Tensor:
    """Random hidden states [1, NUM_TOKENS, H]: small, as embeddings are, so that what a block adds is not lost beside them in bf16."""
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(1, NUM_TOKENS, model.hidden_size, generator=generator)).to(model.dtype)


def trace(blocks: Sequence[nn.Module], run: Run, hidden: Tensor) -> Trace:
    """What passes these blocks, in order, when hidden states [1, NUM_TOKENS, H] are run, and what comes out."""
    entered: list[tuple[Tensor, list[Tensor]]] = []
    seen: list[Passage] = []

    def enter(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        entered.append((_hidden_in(args, options).clone(), _others_in(args, options)))

    def leave(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        given, others = entered[-1]
        first = output if isinstance(output, Tensor) else output[0]
        # Once more, for what the block has put into a container that the next one gets.
        seen.append(Passage(given.to("cpu"), first.to("cpu"), [*others, *_others_in(args, options)]))

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave, with_kwargs=True) for block in blocks]
    try:
        output = run(hidden.clone())  # some families change it in place
    finally:
        for hook in hooks:
            hook.remove()
    return seen, output


def find_misfit(
    model: SpanModel, blocks: Sequence[nn.Module], probe: Tensor, cache: SpanCache, traced: Trace
) -> str | None:
    """Why these blocks, run one after another on nothing but hidden states, are not the model; None if they are.

    traced: of the probe, with the span's cache.
    """
    passages, output = traced
    if not same(output, passages[-1].output):
        return "it computes something after its blocks that cannot be cut off"
    if not cache.is_complete:
        return "its blocks do not keep keys and values of their own for every token"
    # What is between blocks cannot be seen of one alone, so that comes twice.
    run = model.run_twice if len(blocks) == 1 else lambda hidden: model.forward(hidden, model.new_cache(model.span))
    ones = trace(blocks, run, probe)[0] if len(blocks) == 1 else passages
    others = trace(blocks, run, _with_another_end(probe))[0]
    if not all(same(one.output, next_.given) for one, next_ in pairwise(ones)):
        return "it computes something between its blocks"
    if not all(_all_same(one.others, other.others) for one, other in zip(ones, others, strict=True)):
        return "its blocks read more of what is before them than the hidden states of the last one"
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    # One of each kind: for all it would read all weights three times more, and take as long as loading them.
    kinds = {_kind_of(block, index): index for index, block in zip(model.span, blocks, strict=True)}
    for index in sorted(kinds.values()):
        hop, passage = Span(index, index + 1), passages[index - model.span.start]
        misfit = _find_misfit_alone(model, hop, passage, tolerance)
        if misfit is not None:
            return misfit
    return None


def _find_misfit_alone(model: SpanModel, hop: Span, passage: Passage, tolerance: float) -> str | None:
    """Give a block alone what it was given in the span: with another last token; in two steps; moved by one token of padding."""
    given, expected = passage.given, passage.output
    output = model.forward(_with_another_end(given), model.new_cache(hop))
    # Not bit-equal where experts get other batches.
    if float(_errors(output, expected)[:-1].max()) > tolerance:
        return "its tokens depend on later ones"
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


def _kind_of(block: nn.Module, index: int) -> str:
    """Code and options of a block: all that its modules are made of but weights and their index."""
    options = [
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (str, int, type(None))) and not (value == index and key.endswith(_INDEX_NAMES))
    ]
    return repr((options, [(name, parameter.shape) for name, parameter in block.named_parameters()]))


def _with_another_end(hidden: Tensor) -> Tensor:
    changed = hidden.clone()
    changed[:, -1] *= -2
    return changed


def _errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Of each token, the largest difference in units of the largest expected value: float [tokens]."""
    difference = (actual.float() - expected.float()).abs().amax(dim=2)[0]
    return difference / expected.float().abs().max()


def _is_off(steps: Sequence[Tensor], tolerance: float) -> bool:
    """Whether a step has no token that is right: a single one may differ for going to another expert at a near tie."""
    return any(float(errors.min()) > tolerance for errors in steps)


def _hidden_in(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else options["hidden_states"]
    return hidden


def _others_in(args: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    hidden = _hidden_in(args, options)
    return [tensor for tensor in _tensors_in([args, options]) if tensor is not hidden]


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
