"""StepEngine: computes batches of steps on the device. Lives on the device thread.

Where the family allows it, tokens of any sessions are computed together (RaggedSpan), their keys and values lie in pages, and what
others have computed already is taken from there; else one step is computed at a time, each session with a cache of its own.

B batch rows, T new tokens, N tokens of one batch, H hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from node.backend.page_store import PageStore, RowPart
from node.backend.ragged import NotRagged
from node.backend.ragged_span import RaggedSpan
from node.backend.span_cache import SpanCache
from node.backend.span_model import SpanModel
from node.session_pages import Growth
from node.thread_tuner import ThreadTuner
from swarm.span import Span

log = logging.getLogger(__name__)

_BATCHES_BEFORE_TRACE = 32
_MOST_TUNED_TOKENS = 32
"""Larger batches are prompts: few large operators, which bear with a busy machine."""


@dataclass(slots=True, eq=False)
class EngineStep:
    """New tokens of one session. What is under `output` is the engine's."""

    hop: Span
    hidden: Tensor
    """[B, T, H], in the model's dtype."""
    mask: Tensor | None
    """bool [B, T], False for padding; None if all are real."""
    growths: Sequence[Growth] = ()
    tables: Sequence[Sequence[int]] = ()
    """The pages of each row."""
    copies: Sequence[tuple[int, int]] = ()
    """Pages to copy before anything is written."""
    cache: SpanCache | None = None
    """Of a session that is computed alone."""
    rewind_to: int | None = None
    reorder: Tensor | None = None
    output: Tensor | None = None
    """[B, T, H]; of padding zeros, or what the family makes of it."""
    num_done: int = 0
    compute_s: float = 0.0
    started_at: float | None = None
    has_begun: bool = False

    @property
    def num_tokens(self) -> int:
        """To be computed: of all rows together, or of each where the step is computed alone."""
        if self.cache is not None:
            return int(self.hidden.shape[1])
        return sum(growth.num_new for growth in self.growths)


class StepEngine:
    """The blocks of a shard, with the memory for the caches of their sessions."""

    def __init__(self, model: SpanModel, *, num_pages: int, page_tokens: int) -> None:
        self.model = model
        self.ragged: RaggedSpan | None = None
        self._num_batches: Counter[Span] = Counter()
        self._tried: set[Span] = set()
        self._num_traced_blocks = 0
        self.tuner: ThreadTuner | None = None
        """Chooses the threads of small batches, if anybody is to."""
        self.reason = ""
        """Why steps are computed one at a time, if they are."""
        try:
            self.ragged = RaggedSpan(model)
            self._store: PageStore = self.ragged.new_store(num_pages, page_tokens)
        except NotRagged as reason:
            self.reason = str(reason)
            log.info("sessions are served one at a time span=%s reason=%s", model.span, reason)

    @property
    def computes_together(self) -> bool:
        return self.ragged is not None

    def new_cache(self, hop: Span) -> SpanCache | None:
        """For a session that is computed alone."""
        return None if self.computes_together else self.model.new_cache(hop)

    @torch.inference_mode()
    def compute(self, batch: Sequence[tuple[EngineStep, int]]) -> None:
        """Compute so many more tokens of each step, all of one hop. Computing the same tokens again does no harm.

        Raises what torch and transformers raise.
        """
        started = time.monotonic()
        for step, _ in batch:
            step.started_at = step.started_at or started
        with self._tuned(sum(count for _, count in batch)):
            if self.ragged is None:
                ((step, count),) = batch
                self._compute_alone(step, count)
            else:
                self._compute_together(self.ragged, batch)
        elapsed_s = time.monotonic() - started
        for step, count in batch:
            step.num_done += count
            step.compute_s += elapsed_s

    @contextlib.contextmanager
    def _tuned(self, num_tokens: int) -> Iterator[None]:
        """With the threads that suit a batch of so many tokens; those of everything else on this thread stay as they are."""
        if self.tuner is None or not 0 < num_tokens <= _MOST_TUNED_TOKENS:
            yield
            return
        usual, threads = torch.get_num_threads(), self.tuner.threads_for(num_tokens)
        before = self.tuner.threads
        if threads != usual:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        try:
            yield
            self.tuner.note(num_tokens, threads, time.perf_counter() - started)
        finally:
            if threads != usual:
                torch.set_num_threads(usual)
        if self.tuner.threads != before:
            log.info("threads changed from=%d to=%d num_tokens=%d", before, self.tuner.threads, num_tokens)

    def trace(self, hop: Span) -> None:
        """Make further steps of a hop faster (RaggedSpan.trace), once: that takes some 15 ms a block."""
        if self.ragged is not None and hop not in self._tried:
            self._tried.add(hop)
            self._num_traced_blocks += len(hop) * self.ragged.trace(hop)

    def _may_trace(self, hop: Span) -> None:
        """Trace a part of the span once it has proved to be in use.

        As peers may ask for any, all traces together have at most twice as many blocks as the span has.
        """
        self._num_batches[hop] += 1
        has_room = self._num_traced_blocks + len(hop) <= 2 * len(self.model.span)
        if self._num_batches[hop] == _BATCHES_BEFORE_TRACE and has_room:
            self.trace(hop)

    def _compute_alone(self, step: EngineStep, count: int) -> None:
        assert step.cache is not None
        if not step.has_begun:
            step.has_begun = True
            if step.rewind_to is not None:
                step.cache.rewind(step.rewind_to)
            if step.reorder is not None:
                step.cache.reorder(step.reorder)
        first, last = step.num_done, step.num_done + count
        mask = None if step.mask is None else step.mask[:, first:last]
        output = self.model.forward(step.hidden[:, first:last], step.cache, mask=mask)
        step.output = output if step.output is None else torch.cat([step.output, output], dim=1)

    def _compute_together(self, ragged: RaggedSpan, batch: Sequence[tuple[EngineStep, int]]) -> None:
        hop = batch[0][0].hop
        self._may_trace(hop)
        for step, _ in batch:
            if not step.has_begun:
                self._store.copy_pages(step.copies)
                step.has_begun = True
        pieces = [piece for step, count in batch for piece in _pieces(step, count)]
        if pieces:
            parts = [piece.part for piece in pieces]
            hidden = [piece.hidden for piece in pieces]
            output = ragged.forward(hop, hidden[0] if len(hidden) == 1 else torch.cat(hidden), self._store, parts)
            self._keep(parts, output)
            offset = 0
            for piece in pieces:
                piece.put(output[offset : offset + piece.part.num_tokens])
                offset += piece.part.num_tokens
        for step, count in batch:
            if step.num_done + count == step.num_tokens:
                self._fill_in_found(step)

    def _keep(self, parts: Sequence[RowPart], output_NH: Tensor) -> None:
        """Keep what came out, for those who will find these tokens."""
        slots = [self._store.slots(part.pages, part.start, part.length) for part in parts]
        kept = self._store.outputs
        kept.index_copy_(0, slots[0] if len(slots) == 1 else torch.cat(slots), output_NH.to(kept.device))

    def _fill_in_found(self, step: EngineStep) -> None:
        for row, growth in enumerate(step.growths):
            if growth.found:
                slots = self._store.slots(step.tables[row], growth.start, growth.start + growth.found)
                found = self._store.outputs[slots].to("cpu")
                _Piece.of(step, row, 0, growth.found).put(found)
        if step.output is None:
            step.output = torch.zeros_like(step.hidden)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some real tokens of one row of a step."""

    step: EngineStep
    row: int
    columns: Tensor | slice
    """Where they are in the row."""
    part: RowPart

    @classmethod
    def of(cls, step: EngineStep, row: int, first: int, last: int) -> _Piece:
        """first, last: which of the row's new real tokens."""
        columns: Tensor | slice = slice(first, last)
        if step.mask is not None:
            columns = step.mask[row].nonzero()[first:last, 0]
        return cls(step, row, columns, RowPart(step.tables[row], step.growths[row].start + first, last - first))

    @property
    def hidden(self) -> Tensor:
        return self.step.hidden[self.row, self.columns]

    def put(self, output_NH: Tensor) -> None:
        step = self.step
        if step.output is None:
            if output_NH.shape[0] == step.hidden.shape[1] and step.hidden.shape[0] == 1:
                step.output = output_NH[None]
                return
            step.output = torch.zeros_like(step.hidden)
        step.output[self.row, self.columns] = output_NH


def _pieces(step: EngineStep, count: int) -> list[_Piece]:
    """The next `count` tokens of a step, row by row."""
    pieces = []
    skipped = step.num_done
    for row, growth in enumerate(step.growths):
        begin = min(skipped, growth.num_new)
        skipped -= begin
        taken = min(count, growth.num_new - begin)
        if taken:
            pieces.append(_Piece.of(step, row, growth.found + begin, growth.found + begin + taken))
            count -= taken
    return pieces
