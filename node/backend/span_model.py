"""SpanModel: the blocks of a span on a device, behind one small interface. Other backends offer the same.

B batch rows, T new tokens, H hidden size.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from swarm.decoder import BlockSource, build_model, find_blocks, refuse_unfit, renumber, shrink_config
from swarm.errors import BadRequest, UserError
from swarm.span import Span

# Tables of learned positions: whoever holds the ends has added them already.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings")


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
        tensors = checkpoint.load_blocks(span) if state_dict is None else state_dict
        renamed = renumber(tensors, span.start)
        tensors.clear()
        self._base = _blocks_only(shrink_config(checkpoint.config, span), renamed, dtype, checkpoint.name).to(self.device)
        self.hidden_size = int(checkpoint.config.hidden_size)
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self._views: dict[Span, Any] = {span: self._base}

    def new_cache(self, hop: Span) -> SpanCache:
        """An empty cache for the blocks of a hop within the span. BadRequest if it is not."""
        if not self.span.covers(hop):
            raise BadRequest(f"hop {hop} is not in the span {self.span}")
        return SpanCache(hop, first_layer=hop.start - self.span.start)

    def forward(self, hidden_BTH: Tensor, cache: SpanCache, *, mask: Tensor | None = None) -> Tensor:
        """Append T tokens to the cache and return the hidden states after the hop's last block, [B, T, H].

        mask: bool [B, T], False for padding; None if all are real. Positions count the real tokens of each row, as transformers does.
        """
        if hidden_BTH.ndim != 3 or hidden_BTH.shape[2] != self.hidden_size or hidden_BTH.dtype != self.dtype:
            raise BadRequest(
                f"hidden states must be {self.dtype} [batch, tokens, {self.hidden_size}], got {hidden_BTH.dtype} {list(hidden_BTH.shape)}"
            )
        batch, num_new = hidden_BTH.shape[:2]
        past = cache.num_tokens
        attention_mask, positions = cache.extend_mask(mask, batch, num_new)
        options: dict[str, Any] = {"position_ids": positions.to(self.device)} if self._takes_positions else {}
        with torch.inference_mode():
            output = self._view(cache.hop)(
                inputs_embeds=hidden_BTH.to(self.device),
                attention_mask=None if attention_mask is None else attention_mask.to(self.device),
                past_key_values=cache.layers,
                use_cache=True,
                **options,
            )[0]
        cache.num_tokens = past + num_new
        result: Tensor = output.to("cpu")
        return result

    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the cache of one block, measured."""
        cache = self.new_cache(self.span)
        self.forward(torch.zeros(1, 8, self.hidden_size, dtype=self.dtype), cache)
        return -(-cache.num_bytes // (8 * len(self.span)))

    def _view(self, hop: Span) -> Any:
        """The model of only the hop's blocks; shares all modules with the whole."""
        if hop not in self._views:
            local = Span(hop.start - self.span.start, hop.end - self.span.start)
            view = _copied_down_to_blocks(self._base, len(self.span), local)
            self._views[hop] = view
        return self._views[hop]


class SpanCache:
    """Keys and values of a session on one hop: num_tokens for each row, and which of them are real."""

    def __init__(self, hop: Span, first_layer: int) -> None:
        self.hop = hop
        self.num_tokens = 0
        self.layers = _OffsetCache(first_layer)
        self._mask: Tensor | None = None  # bool [B, num_tokens]; None while every token is real

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [tensor for layer in self.layers.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def rewind(self, position: int) -> None:
        """Forget all tokens from position on."""
        if not 0 <= position <= self.num_tokens:
            raise BadRequest(f"cannot rewind to {position}: the cache holds {self.num_tokens} tokens")
        if position == 0:
            self.layers = _OffsetCache(self.layers.first_layer)
        elif position < self.num_tokens:
            self.layers.crop(position - self.num_tokens)
        self._mask = None if self._mask is None else self._mask[:, :position]
        self.num_tokens = position

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was. rows: int64 [B]."""
        if self.num_tokens == 0:
            return
        self.layers.batch_select_indices(rows)
        self._mask = None if self._mask is None else self._mask[rows]

    def extend_mask(self, new: Tensor | None, batch: int, num_new: int) -> tuple[Tensor | None, Tensor]:
        """Take note of which new tokens are real. (attention mask [B, past + T] or None, positions [B or 1, T]) for them."""
        past = self.num_tokens
        if new is None and self._mask is None:
            return None, torch.arange(past, past + num_new)[None]
        old = torch.ones(batch, past, dtype=torch.bool) if self._mask is None else self._mask
        fresh = torch.ones(batch, num_new, dtype=torch.bool) if new is None else new
        whole = torch.cat([old, fresh], dim=1)
        self._mask = whole
        return whole.long(), (whole.long().cumsum(1) - 1).clamp_min(0)[:, past:]


class _OffsetCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache for blocks that know themselves by their index in the shard, while it holds only those of the hop."""

    def __init__(self, first_layer: int) -> None:
        super().__init__()  # without the config: full-length layers, which can be rewound even where attention slides
        self.first_layer = first_layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self.first_layer, *args, **kwargs)


class _ZeroTable(nn.Module):
    """Stands where a table of learned positions was."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, 1, 1, dtype=dtype), persistent=False)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        zero: Tensor = self.zero  # type: ignore[assignment]
        return zero


def _blocks_only(config: Any, state_dict: dict[str, Tensor], dtype: torch.dtype, name: str) -> Any:
    """The base model with these blocks, in which everything else does nothing but rotary tables."""
    config.vocab_size, config.tie_word_embeddings = 4, False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    count = config.num_hidden_layers
    model = build_model(config, state_dict, dtype=dtype, needed=_block_prefixes(config, count), name=name)
    base = model.base_model
    blocks_name, blocks = find_blocks(base, count)
    parent = base.get_submodule(blocks_name.rpartition(".")[0])
    for child, module in list(parent.named_children()):
        if module is not blocks and "rotary" not in child:
            setattr(parent, child, _ZeroTable(dtype) if child in _POSITION_TABLES else nn.Identity())
    _check_that_only_blocks_compute(base, parent, blocks_name.rpartition(".")[2], dtype, int(config.hidden_size), name)
    return base.requires_grad_(False)


def _block_prefixes(config: Any, count: int) -> list[str]:
    """The parts of parameter names that belong to blocks, such as ".layers."; found on a model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config).base_model
    return [f"{find_blocks(base, count)[0].rpartition('.')[2]}."]


def _check_that_only_blocks_compute(base: Any, parent: nn.Module, attribute: str, dtype: torch.dtype, hidden_size: int, name: str) -> None:
    """Without its blocks the cut model must return what it is given; else this family does something that belongs to the ends."""
    blocks = getattr(parent, attribute)
    probe = torch.randn(1, 3, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    setattr(parent, attribute, nn.ModuleList())
    try:
        with torch.inference_mode():
            output = base(inputs_embeds=probe, use_cache=False)[0]
    finally:
        setattr(parent, attribute, blocks)
    if output.shape != probe.shape or not torch.equal(output, probe):
        raise UserError(f"{name} ({base.config.model_type}) computes something between its embedding and its blocks that cannot be cut off; it cannot be served")


def _copied_down_to_blocks(base: Any, count: int, local: Span) -> Any:
    """A copy of base that shares every module but has only the blocks of `local`, and a config for them."""
    blocks_name, blocks = find_blocks(base, count)
    view = copy.copy(base)
    view._modules = dict(base._modules)
    view.config = shrink_config(base.config, local)
    parent = view
    *path, attribute = blocks_name.split(".")
    for step in path:
        child = copy.copy(getattr(parent, step))
        child._modules = dict(child._modules)
        if hasattr(child, "config"):
            child.config = view.config
        setattr(parent, step, child)
        parent = child
    setattr(parent, attribute, nn.ModuleList(list(blocks)[local.start : local.end]))
    return view
