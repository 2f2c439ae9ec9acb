"""Which run a line of the log is about, in a process that hosts several: set for a task, and for all that it starts."""

from __future__ import annotations

import contextvars
import logging

log_label: contextvars.ContextVar[str] = contextvars.ContextVar("log_label", default="")


class LabelFilter(logging.Filter):
    """Gives every record the label, for the format."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.label = log_label.get()
        return True
