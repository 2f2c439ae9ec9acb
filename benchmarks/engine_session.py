"""One session on a node's engine, without a network: what the device does for it, and nothing else."""

from __future__ import annotations

from torch import Tensor

from node.backend.span_model import SpanModel
from node.backend.step_engine import EngineStep, StepEngine
from node.session_pages import Growth

PAGE_TOKENS = 16
_MAX_TOKENS = 4096


class EngineSession:
    """A row of hidden states in the model's dtype, from the first token on."""

    def __init__(self, model: SpanModel) -> None:
        self._engine = StepEngine(model, num_pages=_MAX_TOKENS // PAGE_TOKENS, page_tokens=PAGE_TOKENS)
        self._engine.trace(model.span)  # as a node does when it rests
        self._pages = list(range(_MAX_TOKENS // PAGE_TOKENS))
        self.restart()

    def restart(self) -> None:
        """Forget all tokens."""
        self._num_tokens = 0
        self._cache = self._engine.new_cache(self._engine.model.span)

    def step(self, hidden_1TH: Tensor) -> Tensor:
        """Append tokens, and return what comes out for them."""
        num_new = hidden_1TH.shape[1]
        step = EngineStep(
            hop=self._engine.model.span,
            hidden=hidden_1TH,
            mask=None,
            growths=[Growth(self._num_tokens, 0, num_new)],
            tables=[self._pages],
            cache=self._cache,
        )
        self._engine.compute([(step, num_new)])
        self._num_tokens += num_new
        assert step.output is not None
        return step.output
