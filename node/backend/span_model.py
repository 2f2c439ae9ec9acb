"""SpanModel: the blocks of a span on a device, behind one small interface. Other backends offer the same.

B batch rows, T new tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node.backend.block_codes import BlockCodes
from node.backend.code_store import CodeStore
from node.backend.linear_swap import LinearSwap, activation_dtype
from node.backend.misfit import find_misfit, probe_of, same, trace
from node.backend.span_cache import SpanCache
from node.backend.span_cut import HopView, keep_blocks
from swarm.decoder import (
    LIBRARY_ERRORS,
    BlockSource,
    build_model,
    find_blocks,
    longest_text,
    refuse_unfit,
    renumber,
)
from swarm.errors import BadRequest, UserError
from swarm.linears.frozen import FrozenLinear
from swarm.numeric_class import NUMERIC_CLASSES
from swarm.span import Span
from swarm.terminal import quiet_libraries


class SpanModel:
    """Blocks span.start .. span.end-1 of a checkpoint. One thread at a time may use it."""

    def __init__(
        self,
        checkpoint: BlockSource,
        span: Span,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        state_dict: dict[str, Tensor] | None = None,
        numeric_class: str | None = None,
        code_store: CodeStore | None = None,
        block_digests: Sequence[bytes] = (),
    ) -> None:
        """state_dict: what checkpoint.load_blocks(span) returns, if the caller has it already; emptied here to save memory.

        numeric_class: of a model whose weights never change: its linears are made for that, and dtype follows. None: all modules are
        transformers' own, with weights in dtype.
        code_store: where codes of blocks with these digests may be, and are kept.
        Raises UserError for a model that cannot be served in spans, with the reason.
        """
        refuse_unfit(checkpoint.config, checkpoint.name)
        if numeric_class is not None:
            dtype = activation_dtype(numeric_class)
        self.span, self.dtype, self.device = span, dtype, torch.device(device)
        self.numeric_class = numeric_class or ("fp32" if dtype == torch.float32 else "bf16")
        self.hidden_size = int(checkpoint.config.hidden_size)
        self.longest_text = longest_text(checkpoint.config)
        """Tokens that a session may have; None: as many as anybody likes."""
        tensors = checkpoint.load_blocks(span) if state_dict is None else state_dict
        renamed = renumber(tensors, span.start)
        tensors.clear()
        config = copy.deepcopy(checkpoint.config)
        config.tie_word_embeddings = False

        linears = None
        if numeric_class is not None:
            has_codes = NUMERIC_CLASSES[numeric_class].bits is not None
            codes = BlockCodes(numeric_class, self.hidden_size, code_store, block_digests) if has_codes else None
            linears = LinearSwap(dtype, self.device, codes)

        def cut(model: Any) -> None:
            keep_blocks(model, checkpoint.num_blocks, span)
            if linears is not None:
                linears.take(model, renamed)

        model = build_model(config, renamed, dtype=dtype, cut=cut, name=checkpoint.name)
        if linears is not None:
            linears.put(model)
        self._base = model.base_model.requires_grad_(False).to(self.device)
        self.takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self.autocast_dtype: torch.dtype | None = None
        """What autocast computes in, over float32 weights that are trained. None: no autocast."""
        self._enters_late = False  # whether the base model changes hidden states on their way to the first block
        self._views: dict[Span, HopView] = {}
        self._weight_places: set[int] = set()
        self.note_weights()
        try:
            with quiet_libraries(), torch.inference_mode():
                misfit = self._find_misfit()
        except LIBRARY_ERRORS as error:
            misfit = f"its blocks do not run alone ({(str(error).splitlines() or [type(error).__name__])[0][:160]})"
        if misfit is not None:
            raise UserError(
                f"{checkpoint.name} ({config.model_type}) cannot be served in spans: {misfit}; choose another model"
            )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The blocks' weights. Whoever gives them other memory calls note_weights."""
        return self._base.named_parameters()  # type: ignore[no-any-return]

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules of the blocks."""
        return self._base.named_modules()  # type: ignore[no-any-return]

    def replace_module(self, name: str, module: nn.Module) -> None:
        """Put another one in a module's place. Whoever does so calls note_weights."""
        self._base.set_submodule(name, module)

    def block(self, index: int) -> nn.Module:
        """A block of the span, by its index in the whole model."""
        return find_blocks(self._base, len(self.span))[1][index - self.span.start]

    def twin(self) -> SpanModel:
        """Another one, with modules of its own over the very same weights: what is attached to its blocks changes nothing here."""
        return self._twin({})

    def float32_twin(self) -> SpanModel:
        """As twin, but hidden states are float32, and so are all weights but those of frozen linears, which stay the very same."""
        frozen = {
            id(tensor)
            for module in self._base.modules()
            if isinstance(module, FrozenLinear)
            for tensor in (*module.parameters(), *module.buffers())
        }
        wide: dict[int, Tensor] = {}
        for tensor in (*self._base.parameters(), *self._base.buffers()):
            if id(tensor) not in frozen and tensor.is_floating_point():
                copied = tensor.detach().to(torch.float32, copy=True)
                wide[id(tensor)] = (
                    nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
                )
        twin = self._twin(wide)
        twin.dtype = torch.float32
        twin.note_weights()
        return twin

    def _twin(self, others: dict[int, Tensor]) -> SpanModel:
        """others: what it has in the place of our tensors of these ids."""
        shared = {id(tensor): tensor for tensor in (*self._base.parameters(), *self._base.buffers())}
        return copy.deepcopy(self, {**shared, **others})

    def note_weights(self) -> None:
        """Look up where the weights are: what a graph holds of them is not counted as its own."""
        self._weight_places = {
            tensor.untyped_storage().data_ptr()
            for tensor in itertools.chain(self._base.parameters(), self._base.buffers())
            if not tensor.is_mkldnn  # a PrepackedLinear's, which no graph holds and which tells nobody where it is
        }

    def new_cache(self, hop: Span) -> SpanCache:
        """An empty cache for the blocks of a hop within the span. BadRequest if it is not."""
        if not self.span.covers(hop):
            raise BadRequest(f"hop {hop} is not in the span {self.span}")
        return SpanCache(hop)

    def forward(self, hidden_BTH: Tensor, cache: SpanCache, *, mask: Tensor | None = None) -> Tensor:
        """Append T tokens to the cache and return the hidden states after the hop's last block, [B, T, H].

        mask: bool [B, T], False for padding; None if all are real. Positions count the real tokens of each row, as transformers does.
        """
        self._check(hidden_BTH, mask)
        batch, num_new = hidden_BTH.shape[:2]
        if self.longest_text is not None and cache.num_tokens + num_new > self.longest_text:
            raise BadRequest(
                f"a text of this model may have {self.longest_text} tokens in a session: its rotary tables (longrope) are others for longer ones"
            )
        view = self.view_of(cache.hop)
        with torch.inference_mode(), self._autocast():
            attention_mask, positions = cache.extend_mask(mask, batch, num_new)
            output = view(
                hidden_BTH.to(self.device),
                mask=None if attention_mask is None else attention_mask.to(self.device),
                positions=positions.to(self.device) if self.takes_positions else None,
                cache=cache.layers,
            )
        cache.num_tokens += num_new
        return output.to("cpu")

    def forward_whole(
        self,
        hop: Span,
        hidden_BTH: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """All tokens at once through the blocks of a hop, without a cache: [B, T, H]. With autograd, if the caller has it switched on.

        mask: bool [B, T]; positions: int64 [1 or B, T]; None: what the model does by default. dropout_seed: with the model's own
        dropout, which follows from the seed and the block's index alone, however the blocks are spread over hops.
        """
        self._check(hidden_BTH, mask)
        view = self.view_of(hop)
        if positions is not None and not self.takes_positions:
            raise BadRequest("this model takes no position ids: it counts by the mask")
        with self._autocast(), contextlib.nullcontext() if dropout_seed is None else view.dropout(dropout_seed):
            output = view(
                hidden_BTH.to(self.device),
                mask=None if mask is None else mask.long().to(self.device),
                positions=None if positions is None else positions.to(self.device),
                cache=None,
            )
        return output.to("cpu")

    def differentiable(
        self, hop: Span, hidden_BTH: Tensor, *, row_seeds: Sequence[int] = (), **options: Any
    ) -> tuple[Tensor, Tensor, int]:
        """As forward_whole, keeping the autograd graph: (the input, the output that hangs on it, bytes that the graph holds).

        row_seeds: a dropout seed for each row, whose masks then do not depend on the rows beside it.
        Unless the weights require gradients (a TrainableStage's do), they are no part of the graph.
        """
        given = hidden_BTH.detach().requires_grad_()
        held: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return saved.detach()  # an output that its own graph holds would never be freed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            if row_seeds:
                rows = zip(torch.split(given, 1), row_seeds, strict=True)
                output = torch.cat([self.forward_whole(hop, row, dropout_seed=seed, **options) for row, seed in rows])
            else:
                output = self.forward_whole(hop, given, **options)
        held |= {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in (given, output)}
        return given, output, sum(size for place, size in held.items() if place not in self._weight_places)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _check(self, hidden_BTH: Tensor, mask: Tensor | None) -> None:
        if hidden_BTH.ndim != 3 or hidden_BTH.shape[2] != self.hidden_size or hidden_BTH.dtype != self.dtype:
            raise BadRequest(
                f"hidden states must be {self.dtype} [batch, tokens, {self.hidden_size}], got {hidden_BTH.dtype} {list(hidden_BTH.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden_BTH.shape[:2]):
            raise BadRequest(f"the mask must be bool {list(hidden_BTH.shape[:2])}, got {mask.dtype} {list(mask.shape)}")

    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the cache of one block, measured."""
        cache = self.new_cache(self.span)
        self.forward(torch.zeros(1, 8, self.hidden_size, dtype=self.dtype), cache)
        return -(-cache.num_bytes // (8 * len(self.span)))

    def view_of(self, hop: Span) -> HopView:
        """The model of only a hop's blocks."""
        if hop not in self._views:
            self._views[hop] = HopView(self._base, self.span, hop, self._enters_late)
        return self._views[hop]

    def run_twice(self, hidden_BTH: Tensor) -> Tensor:
        """What comes out, [B, T, H], if the span's blocks come twice: of no use but to see what is between blocks."""
        view = HopView(self._base, self.span, self.span, self._enters_late, times=2)
        return view(hidden_BTH.to(self.device), mask=None, positions=None, cache=None).to("cpu")

    def _find_misfit(self) -> str | None:
        """Why this family's blocks, run one after another, are not the model; None if they are. Tried on random hidden states."""
        blocks, probe = list(find_blocks(self._base, len(self.span))[1]), probe_of(self)
        cache = self.new_cache(self.span)
        traced = trace(blocks, lambda hidden: self.forward(hidden, cache), probe)
        if not same(traced[0][0].given, probe):
            self._enters_late = True
            self._views.clear()
            cache = self.new_cache(self.span)
            traced = trace(blocks, lambda hidden: self.forward(hidden, cache), probe)
        misfit = find_misfit(self, blocks, probe, cache, traced)
        self._views.clear()  # of each block alone
        return misfit
