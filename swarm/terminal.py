"""Progress on stderr for people: a bar when stderr is a terminal, nothing when it is a pipe or when told to be quiet."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


def is_interactive(wanted: bool | None = None) -> bool:
    """Whether to draw: what the caller wants, else whether stderr is a terminal."""
    return sys.stderr.isatty() if wanted is None else wanted


class ProgressBar:
    """A bar over `total` units; a context manager that leaves no line behind when it is done.

    unit: "B" scales to kB, MB, GB; anything else is printed as it is.
    """

    def __init__(self, label: str, total: float | None, *, unit: str = "B", wanted: bool | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._wanted = is_interactive(wanted)
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if self._wanted:
            self._bar = importlib.import_module("tqdm").tqdm(
                desc=self.label,
                total=self.total,
                unit=self.unit,
                unit_scale=True,
                leave=False,
                file=sys.stderr,
                **_screen(),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        if self._bar is not None:
            self._bar.update(amount)

    def reach(self, position: float) -> None:
        """Count `position` units as done in all; never goes back."""
        if self._bar is not None and position > self._bar.n:
            self._bar.update(position - self._bar.n)

    def relabel(self, label: str) -> None:
        """Say what is going on now."""
        if self._bar is not None:
            self._bar.set_description(label)


def bar_class(label: str, *, wanted: bool | None = None) -> type[Any]:
    """A tqdm class for libraries that make their own bars: ours in looks, and silent when we are."""
    tqdm: Any = importlib.import_module("tqdm").tqdm
    disabled = not is_interactive(wanted)

    class LabelledBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "desc": label, "leave": False, "disable": disabled, **_screen()})

    return LabelledBar


def _screen() -> dict[str, int]:
    """Size to draw in. Terminals of containers often say that they have no rows, and then tqdm draws nothing."""
    size = shutil.get_terminal_size()
    return {"ncols": min(100, size.columns), "nrows": max(2, size.lines)}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Nothing on stderr from transformers and huggingface_hub while inside."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    library: Any = importlib.import_module("transformers.utils.logging")

    hub_bars, library_bars = not hub.are_progress_bars_disabled(), library.is_progress_bar_enabled()
    hub_level, library_level = hub.logging.get_verbosity(), library.get_verbosity()
    library.disable_progress_bar()  # the hub's too
    hub.logging.set_verbosity(logging.CRITICAL)
    library.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.logging.set_verbosity(hub_level)
        library.set_verbosity(library_level)
        if library_bars:
            library.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
