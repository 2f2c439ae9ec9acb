"""Shard: a span with its weights loaded, hashed and checked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from node.backend.code_store import CodeStore
from node.backend.mapped_pages import MappedPages
from node.backend.merged_linears import merge_linears
from node.backend.span_model import SpanModel
from swarm.checkpoint import Checkpoint
from swarm.errors import UserError
from swarm.numeric_class import NUMERIC_CLASSES
from swarm.span import Span
from swarm.training.run_model import RunModel


@dataclass(frozen=True, slots=True)
class Shard:
    """Blocks of one model on one device."""

    model: SpanModel
    span: Span
    model_digest: bytes
    block_digests: tuple[bytes, ...]
    numeric_class: str
    cache_bytes_per_token: int
    """Of one row, in all blocks, with what came out of the last."""

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    def digests_of(self, hop: Span) -> tuple[bytes, ...]:
        """Digests of the blocks of a hop within the span."""
        return self.block_digests[hop.start - self.span.start : hop.end - self.span.start]


def load_shard(
    checkpoint: Checkpoint | RunModel, span: Span, *, precision: str, device: str, cache_dir: Path | None = None
) -> Shard:
    """Load in the numeric class `precision`, hash and self-check. UserError if the span does not exist or the weights do not compute.

    cache_dir: where codes of a checkpoint's blocks are kept, if the class has any.
    """
    if span.end > checkpoint.num_blocks:
        raise UserError(
            f"blocks {span} do not exist: {checkpoint.name} has {checkpoint.num_blocks} blocks (0:{checkpoint.num_blocks})"
        )
    tensors = checkpoint.load_blocks(span)
    digests = _digest(checkpoint, span, tensors)
    with contextlib.ExitStack() as stack:
        store = None
        # A run's weights are served for minutes.
        if isinstance(checkpoint, Checkpoint) and NUMERIC_CLASSES[precision].bits is not None:
            store = CodeStore(cache_dir, checkpoint.name, checkpoint.source, precision)
            stack.callback(store.close)
        model = SpanModel(
            checkpoint, span, numeric_class=precision, device=device, state_dict=tensors,
            code_store=store, block_digests=digests,
        )  # fmt: skip
    merge_linears(model)
    return checked_shard(checkpoint, model, digests)


def _digest(checkpoint: Checkpoint | RunModel, span: Span, tensors: dict[str, Tensor]) -> tuple[bytes, ...]:
    """Block by block, so that not all weights are in memory before the first is put to use."""
    if not isinstance(checkpoint, Checkpoint):
        return tuple(checkpoint.digest_blocks(span, tensors))
    digests, pages = [], MappedPages()
    for block in span:
        digests += checkpoint.digest_blocks(Span(block, block + 1), tensors)
        pages.drop(tensors[key] for key in checkpoint.block_keys[block])
    return tuple(digests)


def checked_shard(checkpoint: Checkpoint | RunModel, model: SpanModel, digests: tuple[bytes, ...]) -> Shard:
    """Of blocks that are loaded, with the digest of each. UserError if their weights do not compute."""
    _self_check(model, checkpoint.name)
    return Shard(
        model=model,
        span=model.span,
        model_digest=checkpoint.spec.digest,
        block_digests=digests,
        numeric_class=model.numeric_class,
        cache_bytes_per_token=model.cache_bytes_per_token() * len(model.span)
        + model.hidden_size * model.dtype.itemsize,
    )


def _self_check(model: SpanModel, name: str) -> None:
    """Broken weights must be found before anybody depends on them: a short forward has to be finite, and decoding equal to it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, model.hidden_size, generator=generator).to(model.dtype)
    whole = model.forward(hidden, model.new_cache(model.span))
    cache = model.new_cache(model.span)
    stepped = torch.cat([model.forward(hidden[:, :3], cache), model.forward(hidden[:, 3:], cache)], dim=1)
    if not bool(torch.isfinite(whole).all()):
        raise UserError(
            f"the weights of {name} blocks {model.span} give NaN or infinite values; the checkpoint is damaged, or use --precision fp32"
        )
    error = float((whole - stepped).float().norm() / whole.float().norm())
    if error > (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise UserError(
            f"decoding {name} blocks {model.span} differs from the whole forward by {error:.1e}; this model cannot be served here"
        )
