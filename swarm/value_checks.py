"""Checks of values that peers and users hand us. Each raises a ValueError that names the field and what it must be."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import cast

MAX_TEXT_CHARS = 200


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_whole(name: str, value: object, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(fits, f"{name} must be a whole number from {low} to {high}, got {value!r}")


def check_number(name: str, value: object, needs: str, fits: Callable[[float], bool]) -> None:
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    require(is_finite and fits(cast(float, value)), f"{name} {needs}, got {value!r}")


def check_one_of(name: str, value: object, kinds: type[enum.StrEnum]) -> None:
    require(isinstance(value, kinds), f"{name} must be one of {', '.join(kinds)}, got {value!r}")


def check_text(name: str, value: object, at_least: int = 0) -> None:
    fits = isinstance(value, str) and at_least <= len(value) <= MAX_TEXT_CHARS and value.isprintable()
    require(fits, f"{name} must be {at_least} to {MAX_TEXT_CHARS} printable characters, got {_shown(value)}")


def check_digests(name: str, digests: Sequence[object], num_bytes: int) -> None:
    fits = all(isinstance(digest, bytes) and len(digest) == num_bytes for digest in digests)
    require(fits, f"{name} must be digests of {num_bytes} bytes")


def is_path_below(path: object) -> bool:
    """Whether a path names a file below a folder, on every system: peers join it to a folder of theirs."""
    if not isinstance(path, str) or not path.isprintable() or len(path) > MAX_TEXT_CHARS:
        return False
    return all(part not in ("", ".", "..") and not set(part) & set("\\:") for part in path.split("/"))


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) <= MAX_TEXT_CHARS else f"{repr(value)[:MAX_TEXT_CHARS]}..."
