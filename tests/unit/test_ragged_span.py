"""RaggedSpan: a trace computes the same bits as the blocks, or is not used; blocks that cannot run ragged are found out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from node.backend.page_store import PageStore, RowPart
from node.backend.ragged import NotRagged
from node.backend.ragged_span import RaggedSpan
from node.backend.span_model import SpanModel
from node.backend.step_engine import StepEngine
from swarm.span import Span
from tests.support.engines import HIDDEN, SPAN, assert_close, engines

__all__ = ["engines"]

TRACED = ("llama", "mistral", "gemma2", "gpt_oss")  # gpt2's trace differs in the last bit
HOPS = (SPAN, Span(2, 3))


class Doubled(nn.Module):
    """Doubles what a module gives when a rule says so of its input."""

    def __init__(self, inner: nn.Module, rule: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.inner, self._rule = inner, rule

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.inner(hidden)
        return output * 2 if self._rule(hidden) else output


def planted(model: SpanModel, rule: Callable[[Tensor], bool]) -> SpanModel:
    """The same blocks, but one of them breaks the rule that a token's output depends on that token and those before it."""
    twin = model.twin()
    block = twin.block(2)
    block.mlp = Doubled(block.mlp, rule)
    return twin


RULES: dict[str, Callable[[Tensor], bool]] = {
    "the number of tokens": lambda hidden: hidden.shape[1] > 1,
    "the values": lambda hidden: float(hidden.sum()) > 0,
}


def random_steps(dice: random.Random) -> list[list[RowPart]]:
    """Rows that grow by a few tokens each, in pages that lie in a mess; batches as small as they are traced for."""
    pages = [[5, 0, 9], [1, 7, 3], [2, 6, 8]]
    lengths, steps = [0, 0, 0], []
    for _ in range(10):
        parts = []
        for row in dice.sample(range(3), dice.randint(1, 3)):
            count = min(dice.choice((1, 1, 2, 5)), 12 - lengths[row])
            if count:
                parts.append(RowPart(pages[row], lengths[row], count))
                lengths[row] += count
        steps += [parts] * bool(parts)
    return steps


def outputs_of(span: RaggedSpan, hop: Span, store: PageStore, steps: Sequence[Sequence[RowPart]]) -> list[Tensor]:
    hidden = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(5))
    sizes = [sum(part.num_tokens for part in parts) for parts in steps]
    pieces = hidden[: sum(sizes)].split(sizes)
    return [span.forward(hop, piece, store, parts) for piece, parts in zip(pieces, steps, strict=True)]


@pytest.mark.parametrize("family", TRACED)
def test_a_trace_computes_the_same_bits_as_the_blocks(family: str, engines: dict[str, StepEngine]) -> None:
    model = engines[family].model
    plain, traced = RaggedSpan(model), RaggedSpan(model)
    steps = random_steps(random.Random(1))
    for hop in HOPS:
        assert traced.trace(hop) and hop in traced._traced and not plain._traced
        expected, actual = (outputs_of(span, hop, span.new_store(10, 4), steps) for span in (plain, traced))
        assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_trace_that_computes_something_else_is_not_used(
    rule: str, engines: dict[str, StepEngine], caplog: pytest.LogCaptureFixture
) -> None:
    model = engines["llama"].model
    span = RaggedSpan(model)
    span.model = planted(model, RULES[rule])
    steps = random_steps(random.Random(2))
    before = outputs_of(span, SPAN, span.new_store(10, 4), steps)
    with caplog.at_level(logging.INFO):
        assert not span.trace(SPAN)
    assert "hop not traced hop=1:4 reason=it computes something else" in caplog.text
    after = outputs_of(span, SPAN, span.new_store(10, 4), steps)
    assert not span._traced and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_blocks_that_cannot_be_traced_are_called_as_ever(
    engines: dict[str, StepEngine], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_trace(_: Tensor) -> bool:
        if torch.jit.is_tracing():
            raise RuntimeError("planted\nmore of it")
        return False

    model = engines["llama"].model
    span = RaggedSpan(model)
    span.model = planted(model, refuse_trace)
    with caplog.at_level(logging.INFO):
        assert not span.trace(SPAN)
    assert "hop not traced hop=1:4 reason=planted" in caplog.text and "more of it" not in caplog.text
    steps = random_steps(random.Random(3))
    outputs = [outputs_of(each, SPAN, each.new_store(10, 4), steps) for each in (span, RaggedSpan(model))]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_blocks_whose_tokens_depend_on_who_is_beside_them_do_not_run_ragged(
    rule: str, engines: dict[str, StepEngine]
) -> None:
    with pytest.raises(NotRagged, match="together its rows differ by"):
        RaggedSpan(planted(engines["llama"].model, RULES[rule]))


def test_a_family_that_counts_positions_by_a_mask_serves_one_session_at_a_time(engines: dict[str, StepEngine]) -> None:
    engine = engines["bloom"]
    assert not engine.computes_together and engine.reason and engine.new_cache(SPAN) is not None
    assert engines["llama"].computes_together and engines["llama"].new_cache(SPAN) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_it_makes_no_difference_where_the_pages_lie(family: str, engines: dict[str, StepEngine]) -> None:
    """Side by side they are read as they lie, else gathered."""
    span = engines[family].ragged
    assert span is not None
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(6))
    outputs = []
    for pages in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 5, 9, 0, 1, 2, 8, 7, 3, 6]):
        store = span.new_store(10, 4)
        steps = [[RowPart(pages, start, end - start)] for start, end in ((0, 23), (23, 24), (24, 33), (33, 40))]
        pieces = hidden.split((23, 1, 9, 7))
        outputs.append(torch.cat([span.forward(SPAN, *each) for each in zip(pieces, [store] * 4, steps, strict=True)]))
    assert_close(outputs[0], outputs[1])
