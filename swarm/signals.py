"""Signals: what SIGTERM and SIGINT ask of a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal


class Signals:
    """What SIGTERM and SIGINT ask for: the first one to leave, a second one to leave without waiting for sessions."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # A further signal, when all is done and only the interpreter has to end, must not make it look like a crash.
            stack.callback(signal.signal, number, signal.SIG_IGN)
            stack.callback(loop.remove_signal_handler, number)
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()
