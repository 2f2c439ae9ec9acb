"""A real node of another protocol version: python -m tests.support.other_version_node MAJOR MINOR run ..."""

from __future__ import annotations

import sys

from node import runtime
from node.cli import main
from swarm import messages

if __name__ == "__main__":
    major, minor = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    for module in (messages, runtime):
        module.PROTOCOL_MAJOR, module.PROTOCOL_MINOR = major, minor  # type: ignore[attr-defined]
    main()
