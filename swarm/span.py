"""Span: a half-open range of blocks. A pure value; it knows nothing of weights or peers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks start, start+1, ..., end-1 of one model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"need 0 <= start < end, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> Span:
        """Span from "start:end", e.g. "0:10". Raises ValueError with what was expected."""
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if match is None:
            raise ValueError(f"expected blocks as start:end, for example 0:10, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def covers(self, other: Span) -> bool:
        """Whether every block of other is in this span."""
        return self.start <= other.start and other.end <= self.end

    def has(self, block: int) -> bool:
        return self.start <= block < self.end
