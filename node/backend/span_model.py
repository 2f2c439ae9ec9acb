"""SpanModel: the blocks of a span on a device, behind one small interface. Other backends offer the same.

B batch rows, T new tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from swarm.decoder import (
    LIBRARY_ERRORS,
    BlockSource,
    build_model,
    find_blocks,
    positions_of,
    refuse_unfit,
    renumber,
    replace_blocks,
)
from swarm.errors import BadRequest, UserError
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
    ) -> None:
        """state_dict: what checkpoint.load_blocks(span) returns, if the caller has it already; emptied here to save memory.

        Raises UserError for a model that cannot be served in spans, with the reason.
        """
        refuse_unfit(checkpoint.config, checkpoint.name)
        self.span, self.dtype, self.device = span, dtype, torch.device(device)
        self.hidden_size = int(checkpoint.config.hidden_size)
        tensors = checkpoint.load_blocks(span) if state_dict is None else state_dict
        renamed = renumber(tensors, span.start)
        tensors.clear()
        config = copy.deepcopy(checkpoint.config)
        config.tie_word_embeddings = False

        def cut(model: Any) -> None:
            _keep_blocks(model, checkpoint.num_blocks, span)

        model = build_model(config, renamed, dtype=dtype, cut=cut, name=checkpoint.name)
        self._base = model.base_model.requires_grad_(False).to(self.device)
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self.autocast_dtype: torch.dtype | None = None
        """What autocast computes in, over float32 weights that are trained. None: no autocast."""
        self._enters_late = False  # whether the base model changes hidden states on their way to the first block
        self._views: dict[Span, _View] = {}
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

    def block(self, index: int) -> nn.Module:
        """A block of the span, by its index in the whole model."""
        return find_blocks(self._base, len(self.span))[1][index - self.span.start]

    def twin(self) -> SpanModel:
        """Another one, with modules of its own over the very same weights: what is attached to its blocks changes nothing here."""
        shared = {id(tensor): tensor for tensor in (*self._base.parameters(), *self._base.buffers())}
        return copy.deepcopy(self, dict(shared))

    def note_weights(self) -> None:
        """Look up where the weights are: what a graph holds of them is not counted as its own."""
        self._weight_places = {
            tensor.untyped_storage().data_ptr()
            for tensor in itertools.chain(self._base.parameters(), self._base.buffers())
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
        view = self._view_of(cache.hop)
        with torch.inference_mode(), self._autocast():
            attention_mask, positions = cache.extend_mask(mask, batch, num_new)
            hidden_BTH = hidden_BTH.to(self.device)
            if view.entry is not None:
                view.entry.given = hidden_BTH
            options: dict[str, Any] = {"position_ids": positions.to(self.device)} if self._takes_positions else {}
            output: Tensor = view.base(
                inputs_embeds=hidden_BTH,
                attention_mask=None if attention_mask is None else attention_mask.to(self.device),
                past_key_values=cache.layers,
                use_cache=True,
                **options,
            )[0]
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
        view = self._view_of(hop)
        options: dict[str, Any] = {}
        if positions is not None:
            if not self._takes_positions:
                raise BadRequest("this model takes no position ids: it counts by the mask")
            options["position_ids"] = positions.to(self.device)
        hidden_BTH = hidden_BTH.to(self.device)
        if view.entry is not None:
            view.entry.given = hidden_BTH
        with self._autocast(), contextlib.nullcontext() if dropout_seed is None else view.dropout(dropout_seed):
            output: Tensor = view.base(
                inputs_embeds=hidden_BTH,
                attention_mask=None if mask is None else mask.long().to(self.device),
                use_cache=False,
                **options,
            )[0]
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

    def _view_of(self, hop: Span) -> _View:
        if hop not in self._views:
            self._views[hop] = _View(self._base, self.span, hop, self._enters_late)
        return self._views[hop]

    def _find_misfit(self) -> str | None:
        """Why this family's blocks, run one after another, are not the model; None if they are. Tried on random hidden states."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 4, self.hidden_size, generator=generator).to(self.dtype)
        passed = self._trace(probe)
        if not _same(passed[0][0].to("cpu"), probe):
            self._enters_late = True
            self._views.clear()
            passed = self._trace(probe)
        if not all(_same(after, before) for (_, after), (before, _) in itertools.pairwise(passed)):
            return "it computes something between its blocks"
        cache = self.new_cache(self.span)
        output = self.forward(probe, cache)
        if not _same(output, passed[-1][1].to("cpu")):
            return "it computes something after its blocks that cannot be cut off"
        if not cache.is_complete:
            return "its blocks do not keep keys and values of their own for every token"
        changed = probe.clone()
        changed[:, -1] *= -2
        difference = self.forward(changed, self.new_cache(self.span))[:, :-1] - output[:, :-1]
        # Not bit-equal where experts get other batches, but a block that looks ahead differs in the first digits.
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        return "its tokens depend on later ones" if difference.abs().max() > tolerance * output.abs().max() else None

    def _trace(self, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each block of the span received and returned in one forward."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            given = args[0] if args else options["hidden_states"]
            seen.append((given, output if isinstance(output, Tensor) else output[0]))

        _, blocks = find_blocks(self._base, len(self.span))
        hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
        try:
            self.forward(probe, self.new_cache(self.span))
        finally:
            for hook in hooks:
                hook.remove()
        return seen


class SpanCache:
    """Keys and values of a session on one hop: num_tokens for each row, and which of them are real."""

    def __init__(self, hop: Span) -> None:
        self.hop = hop
        self.num_tokens = 0
        self.layers = _OffsetCache(hop.start)
        self._mask: Tensor | None = None  # bool [B, num_tokens]; None while every token is real

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [
            tensor for layer in self.layers.layers if layer.is_initialized for tensor in (layer.keys, layer.values)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_complete(self) -> bool:
        """Whether every block of the hop has keys and values for every token."""
        return [layer.get_seq_length() for layer in self.layers.layers] == [self.num_tokens] * len(self.hop)

    def rewind(self, position: int) -> None:
        """Forget all tokens from position on."""
        if not 0 <= position <= self.num_tokens:
            raise BadRequest(f"cannot rewind to {position}: the cache holds {self.num_tokens} tokens")
        if position == 0:
            self.layers = _OffsetCache(self.hop.start)
        elif position < self.num_tokens:
            self.layers.crop(position - self.num_tokens)
        self._mask = None if self._mask is None or position == 0 else self._mask[:, :position]
        self.num_tokens = position

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was. rows: int64 [B]."""
        if self.num_tokens == 0:
            return
        with torch.inference_mode():
            self.layers.batch_select_indices(rows)
            self._mask = None if self._mask is None else self._mask[rows]

    def extend_mask(self, new: Tensor | None, batch: int, num_new: int) -> tuple[Tensor | None, Tensor]:
        """Take note of which new tokens are real. (attention mask [B, past + T] or None, positions [B or 1, T]) for them."""
        past = self.num_tokens
        if new is None and self._mask is None:
            return None, torch.arange(past, past + num_new)[None]
        old = torch.ones(batch, past, dtype=torch.bool) if self._mask is None else self._mask[:, :past]
        fresh = torch.ones(batch, num_new, dtype=torch.bool) if new is None else new
        self._mask = torch.cat([old, fresh], dim=1)
        attention_mask = self._mask.long()
        return attention_mask, positions_of(attention_mask, past)


class _OffsetCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache for blocks that know themselves by their index in the model, while it holds only those of the hop."""

    def __init__(self, first_block: int) -> None:
        super().__init__()  # without the config: full-length layers, which can be rewound even where attention slides
        self.first_block = first_block

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self.first_block, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Base models ask for "the" length as that of layer 0, blocks for their own.
        return int(super().get_seq_length(max(layer_idx - self.first_block, 0)))


class _View:
    """The model of only a hop's blocks; it shares all modules with the whole span."""

    def __init__(self, base: Any, span: Span, hop: Span, enters_late: bool) -> None:
        local = Span(hop.start - span.start, hop.end - span.start)
        name, blocks = find_blocks(base, len(span))
        first, *rest = list(blocks)[local.start : local.end]
        self.entry = _Entry(first) if enters_late else None
        self._blocks = dict(zip(hop, [first, *rest], strict=True))
        self.base = parent = _copy_shallowly(base)
        for step in name.split(".")[:-1]:
            child = _copy_shallowly(getattr(parent, step))
            setattr(parent, step, child)
            parent = child
        replace_blocks(self.base, len(span), local, [self.entry or first, *rest])

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Train mode, with a random state for each block that follows from the seed and the block's index."""

        def reseed(index: int) -> Any:
            digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()

            def hook(*_: Any) -> None:
                torch.manual_seed(int.from_bytes(digest[:7], "big"))

            return hook

        hooks = [block.register_forward_pre_hook(reseed(index)) for index, block in self._blocks.items()]
        try:
            with torch.random.fork_rng():
                self.base.train()
                yield
        finally:
            self.base.eval()
            for hook in hooks:
                hook.remove()


class _Entry(nn.Module):
    """Stands for the first block where the base model changes what it is given (a scale, say) before that gets there."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.given: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        return self.block(self.given, *args, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _Nothing(nn.Module):
    """Stands where a norm or all that embeds tokens was, and returns the hidden states that it is given; or where a table of
    positions was, and returns zero whatever it is asked."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._replaced = (replaced,)  # in a tuple, so that it is none of the model's modules
        self._is_table = isinstance(replaced, nn.Embedding)

    def forward(self, *args: Any, **options: Any) -> Any:
        given = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        hidden = [tensor for tensor in given if tensor.is_floating_point() and tensor.ndim == 3]
        if hidden and not self._is_table:
            return hidden[0]
        # Of the one type that takes no other with it when it is added.
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=given[0].device if given else None)

    def __getattr__(self, name: str) -> Any:
        """To code that only looks at it, it is what it replaced, whose weights are not in memory."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; broken weights (NaN) are for the caller of SpanModel to find."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def _copy_shallowly(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _keep_blocks(model: Any, num_blocks: int, span: Span) -> None:
    """Leave of a causal LM only the blocks of the span, and tables of rotations; all else does nothing."""
    base = model.base_model
    _, blocks = find_blocks(base, num_blocks)
    parents = replace_blocks(base, num_blocks, span, list(blocks)[span.start : span.end])
    chain = [*parents, find_blocks(base, len(span))[1]]
    for parent in dict.fromkeys([model, *parents]):
        for name, child in list(parent.named_children()):
            if all(child is not kept for kept in chain) and "rotary" not in name:
                setattr(parent, name, _Nothing(child))
