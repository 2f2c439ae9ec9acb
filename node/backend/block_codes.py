"""BlockCodes: the codes of a model's linears, made of their weights, or as a store on this disk has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from node.backend.code_store import CodeStore
from swarm.linears.quantize import Codes, Int4Codes, Int8Codes, quantize

_NUMBERED = re.compile(r"(?:^|.*?\.)(\d+)\.(.*)")


class BlockCodes:
    """For the linears of one block after another. `close` after the last one."""

    def __init__(
        self,
        numeric_class: str,
        hidden_size: int,
        store: CodeStore | None = None,
        digests: Sequence[bytes] = (),
    ) -> None:
        """digests: of the blocks' weights, in order, if there is a store."""
        self._class, self._hidden_size = numeric_class, hidden_size
        self._store, self._digests = store, digests
        self._index: int | None = None  # of the block whose codes are collected
        self._kept: Mapping[str, Mapping[str, Tensor]] = {}
        self._codes: dict[str, Codes] = {}
        self._has_new = False

    def of(self, name: str, weight_OI: Tensor) -> Codes:
        """Codes of a linear. name: in the state dict, with the number of its block in the span."""
        kind = kind_of_codes(self._class, weight_OI.shape, self._hidden_size)
        match = _NUMBERED.fullmatch(name)
        if self._store is None or match is None:
            return quantize(kind, weight_OI)
        if int(match[1]) != self._index:
            self._begin(int(match[1]))
        kept = self._kept.get(match[2])
        codes = None if kept is None else _fitting(kind, kept, weight_OI.shape)
        if codes is None:
            codes, self._has_new = quantize(kind, weight_OI), True
        self._codes[match[2]] = codes
        return codes

    def close(self) -> None:
        if self._store is not None and self._index is not None and self._has_new:
            self._store.write(self._digests[self._index], self._codes)
        self._index, self._codes, self._has_new = None, {}, False

    def _begin(self, index: int) -> None:
        assert self._store is not None
        self.close()
        self._index, self._kept = index, self._store.read(self._digests[index])


def kind_of_codes(numeric_class: str, shape: Sequence[int], hidden_size: int) -> type[Codes]:
    """Of a linear [O, I]: in int4 keys and values that several heads share get 8 bits.

    These are 6 % of SmolLM2-135M's weights, and half of what int4 does to its perplexity (docs/log.md).
    """
    is_narrow = shape[1] == hidden_size and 2 * shape[0] <= hidden_size
    return Int8Codes if numeric_class == "int8" or is_narrow else Int4Codes


def _fitting(kind: type[Codes], tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Codes | None:
    try:
        codes = kind.of(tensors, shape[1])
    except (ValueError, KeyError):
        return None
    return codes if len(codes) == shape[0] else None
