"""How the blocks of a span, and those of a hop in it, are cut out of a transformers model."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from swarm.decoder import find_blocks, replace_blocks
from swarm.span import Span


def keep_blocks(model: Any, num_blocks: int, span: Span) -> None:
    """Leave of a causal LM only the blocks of the span, and tables of rotations; all else does nothing."""
    base = model.base_model
    _, blocks = find_blocks(base, num_blocks)
    parents = replace_blocks(base, num_blocks, list(span), list(blocks)[span.start : span.end])
    chain = [*parents, find_blocks(base, len(span))[1]]
    for parent in dict.fromkeys([model, *parents]):
        for name, child in list(parent.named_children()):
            if all(child is not kept for kept in chain) and "rotary" not in name:
                setattr(parent, name, _Nothing(child))


class HopView:
    """The model of only a hop's blocks; it shares all modules with the whole span."""

    def __init__(self, base: Any, span: Span, hop: Span, enters_late: bool, *, times: int = 1) -> None:
        """times: how often the hop's blocks come one after another. If more than once, they have no cache to use."""
        name, blocks = find_blocks(base, len(span))
        places = [index - span.start for index in hop] * times
        first, *rest = [blocks[place] for place in places]
        self.entry = _Entry(first) if enters_late else None
        self._blocks = {index: blocks[index - span.start] for index in hop}
        self.base = parent = _copy_shallowly(base)
        for step in name.split(".")[:-1]:
            child = _copy_shallowly(getattr(parent, step))
            setattr(parent, step, child)
            parent = child
        replace_blocks(self.base, len(span), places, [self.entry or first, *rest])
        found = {id(config): config for m in self.base.modules() if (config := getattr(m, "config", None)) is not None}
        self.configs: list[Any] = list(found.values())
        """Of the base and the blocks: their options are read from these in each forward."""

    def __call__(self, hidden_BTH: Tensor, *, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """The hidden states after the last block, [B, T, H]. mask: [B, past + T]; positions: [1 or B, T]; what is None is not said."""
        if self.entry is not None:
            self.entry.given, hidden_BTH = hidden_BTH, hidden_BTH.clone()  # some families change it in place
        options: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        if cache is not None:
            options["past_key_values"] = cache
        output: Tensor = self.base(
            inputs_embeds=hidden_BTH, attention_mask=mask, use_cache=cache is not None, **options
        )[0]
        return output

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
    """Stands where a norm was, or all that embeds tokens, and returns the hidden states that it is given; or where a table of
    positions was, and returns zero whatever it is asked. To code that only looks at it, it is what it replaced."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._replaced = (replaced,)  # in a tuple, so that its weights are none of the model's; they have no memory
        self._is_table = isinstance(replaced, nn.Embedding)

    def forward(self, *args: Any, **options: Any) -> Any:
        given = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        hidden = [tensor for tensor in given if tensor.is_floating_point() and tensor.ndim == 3]
        if hidden and not self._is_table:
            return hidden[0]
        # Of the one type that takes no other with it when it is added.
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=given[0].device if given else None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)


def _copy_shallowly(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
