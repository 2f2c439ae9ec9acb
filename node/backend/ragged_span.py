"""RaggedSpan: many sessions' tokens through the blocks of a SpanModel at once, where the family allows it.

N tokens in all, H hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node.backend import ragged
from node.backend.page_store import PageStore, RowPart
from node.backend.ragged import NotRagged, RaggedStep
from node.backend.span_cut import HopView
from node.backend.span_model import SpanModel
from swarm.decoder import LIBRARY_ERRORS
from swarm.span import Span
from swarm.terminal import quiet_libraries

log = logging.getLogger(__name__)

# Relative; the same operations in another order, and attention by another kernel.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_TRIAL_LENGTHS = (11, 5, 8)
_PAGE_TOKENS = 4
_TRACED_TOKENS = 16
"""Of a batch, at most. A trace knows no `if`, and with more tokens some linears take another way."""
_MOST_CONSTANT = 1 << 16
"""Numbers in a tensor."""


class RaggedSpan:
    """Ragged batches on the blocks of a model. One thread at a time may use it, or the model.

    A hop can be *traced*: torch records which operators its blocks call, in some 15 ms a block, and calls them from then on without
    Python between them. That makes a block's step shorter by 0.12 ms of 0.55 (SmolLM2-135M in bf16). torch.jit.trace is deprecated, and
    what it records is only right if the blocks do the same whatever they are given: so a trace is compared with the blocks themselves
    before it is used.
    """

    def __init__(self, model: SpanModel) -> None:
        """Raises NotRagged, with the reason, for families whose sessions must be computed one at a time."""
        self.model = model
        self._traced: dict[Span, Callable[[Tensor, Tensor], Tensor]] = {}
        if model.longest_text is not None:
            raise NotRagged("its rotary tables are others for all tokens once one of them is far enough")
        try:
            with quiet_libraries(), torch.inference_mode():
                error = self._try()
        except LIBRARY_ERRORS as failure:
            reason = (str(failure).splitlines() or [type(failure).__name__])[0][:160]
            raise NotRagged(f"its blocks do not run ragged ({reason})") from failure
        if not error <= _TOLERANCE[model.dtype]:
            raise NotRagged(f"together its rows differ by {error:.1e} from each alone")

    def new_store(self, num_pages: int, page_tokens: int) -> PageStore:
        return PageStore(num_pages, page_tokens, self.model.hidden_size, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def forward(
        self, hop: Span, hidden_NH: Tensor, store: PageStore, parts: Sequence[RowPart], *, is_trial: bool = False
    ) -> Tensor:
        """The hidden states after the hop's last block, [N, H]: of the parts' tokens, one part behind the other."""
        step = RaggedStep(store, parts)
        hidden = hidden_NH[None].to(self.model.device)
        positions = step.positions().to(self.model.device)
        with ragged.active(step, is_trial=is_trial):
            traced = self._traced.get(hop) if len(hidden_NH) <= _TRACED_TOKENS else None
            output: Tensor = (traced or self._blocks_of(hop))(hidden, positions)
        return output[0].to("cpu")

    def trace(self, hop: Span) -> bool:
        """Trace a hop's blocks. Whether that succeeded; if not, a log line says why, and they are called as ever."""
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(_TRACED_TOKENS, self.model.hidden_size, generator=generator).to(
            self.model.device, self.model.dtype
        )
        steps = [
            [RowPart([0], 0, 1)],
            [RowPart([0], 1, 1), RowPart([2, 1], 0, 5)],
            [RowPart([2, 1], 5, 1)],
            [RowPart([0], 2, 1), RowPart([4, 3, 6, 7], 0, _TRACED_TOKENS - 1)],
        ]
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = self._outputs(hop, hidden, steps)
                # Profiles keep a second graph, 0.4 MB for each block, and make no step faster.
                torch._C._jit_set_profiling_executor(False)
                with torch.no_grad(), ragged.active(RaggedStep(self.new_store(1, _PAGE_TOKENS), steps[0])):
                    example = (hidden[None, :1], torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
                    self._traced[hop] = _recorded(self._blocks_of(hop), example)
                traced = self._outputs(hop, hidden, steps)
            if all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True)):
                return True
            reason = "it computes something else"
        except LIBRARY_ERRORS as failure:
            reason = (str(failure).splitlines() or [type(failure).__name__])[0][:160]
        self._traced.pop(hop, None)
        log.info("hop not traced hop=%s reason=%s", hop, reason)
        return False

    def _outputs(self, hop: Span, hidden_NH: Tensor, steps: Sequence[Sequence[RowPart]]) -> list[Tensor]:
        """Of steps one after another, of which each begins with the first of these hidden states, in pages of their own."""
        store = self.new_store(8, _PAGE_TOKENS)
        return [self.forward(hop, hidden_NH[: sum(part.num_tokens for part in parts)], store, parts) for parts in steps]

    def _blocks_of(self, hop: Span) -> _RaggedBlocks:
        return _RaggedBlocks(self.model.view_of(hop), takes_positions=self.model.takes_positions)

    def _try(self) -> float:
        """The largest relative difference between rows that are computed together and each of them alone.

        Prompts of some tokens, a part of them in a second step, then one token for each; through pages that lie in a mess.
        """
        model, span = self.model, self.model.span
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randn(length + 2, model.hidden_size, generator=generator).to(model.dtype) for length in _TRIAL_LENGTHS
        ]
        alone = []
        for row in rows:
            cache = model.new_cache(span)
            alone.append(torch.cat([model.forward(part[None], cache)[0] for part in (row[:-2], row[-2:-1], row[-1:])]))
        pages_each = -(-max(map(len, rows)) // _PAGE_TOKENS)
        store = self.new_store(len(rows) * pages_each, _PAGE_TOKENS)
        tables = [list(range(number, store.num_pages, len(rows))) for number in range(len(rows))]
        together: list[list[Tensor]] = [[] for _ in rows]
        done = [0] * len(rows)
        for counts in ((7, 5, 0), (4, 1, 8), (1, 0, 1), (1, 1, 1)):
            chosen = [number for number, count in enumerate(counts) if count]
            parts = [RowPart(tables[number], done[number], counts[number]) for number in chosen]
            hidden = torch.cat([rows[n][done[n] : done[n] + counts[n]] for n in chosen])
            output = self.forward(span, hidden, store, parts, is_trial=True)
            for number, piece in zip(chosen, torch.split(output, [counts[n] for n in chosen]), strict=True):
                together[number].append(piece)
                done[number] += counts[number]
        differences = [
            (torch.cat(own).float() - other.float()).abs().max() / other.float().abs().max()
            for own, other in zip(together, alone, strict=True)
        ]
        return float(max(differences))


class _RaggedBlocks(nn.Module):
    """A hop's blocks, with ragged attention."""

    def __init__(self, view: HopView, *, takes_positions: bool) -> None:
        super().__init__()
        self.base = view.base
        self._view, self._takes_positions = view, takes_positions

    def forward(self, hidden_1NH: Tensor, positions_1N: Tensor) -> Tensor:
        with _ragged_attention(self._view.configs):
            return self._view(
                hidden_1NH,
                mask=None,
                positions=positions_1N if self._takes_positions else None,
                cache=ragged.NotingCache(),
            )


def _recorded(blocks: _RaggedBlocks, example: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What the blocks do. Recorded as a function, which takes a quarter of a module's time and memory for no copies (docs/log.md)."""
    # All else that the function reads becomes a constant of its graph. Weights must not: what the graph could make of them beforehand
    # it would, and keep, and packed ones cannot be constants at all.
    tensors = {id(tensor): tensor for tensor in (*blocks.parameters(), *blocks.buffers())}
    weights = [tensor for tensor in tensors.values() if tensor.is_mkldnn or tensor.numel() > _MOST_CONSTANT]

    def compute(hidden_1NH: Tensor, positions_1N: Tensor, *_: Tensor) -> Tensor:
        output: Tensor = blocks(hidden_1NH, positions_1N)
        return output

    function = torch.jit.trace(compute, (*example, *weights), check_trace=False, _store_inputs=False)  # type: ignore[no-untyped-call]
    return lambda hidden_1NH, positions_1N: function(hidden_1NH, positions_1N, *weights)


@contextlib.contextmanager
def _ragged_attention(configs: Sequence[Any]) -> Iterator[None]:
    usual = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ragged.NAME
        yield
    finally:
        for config, implementation in zip(configs, usual, strict=True):
            config._attn_implementation = implementation
