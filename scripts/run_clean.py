"""Runs a command and fails when it leaves anything behind: `run_clean.py COMMAND [ARGUMENT...]`.

The command gets a temporary folder of its own (short, because the names of Unix sockets are limited to about 100
bytes) and a marker in its environment. Afterwards no process may carry the marker (Linux only: read from /proc), and no
socket or runtime folder may be left but those of killed processes, which the next start of any of our programs sweeps:
so does this. The exit status is the command's, or 1 when something was left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from swarm.p2p.runtime_dir import sweep

MARKER = "SHARDSWARM_TEST_RUN"
# After its owner was killed, a p2pd may live this long by design.
GRACE_S = 6.0


def main(command: Sequence[str]) -> int:
    run_id = uuid.uuid4().hex
    folder = Path(tempfile.mkdtemp(prefix="ss-", dir="/tmp"))
    environment = os.environ | {
        MARKER: run_id,
        "TMPDIR": str(folder),
        # Two busy OpenMP threads on a loaded machine with two cores collapse 20x.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    child = subprocess.Popen(command, env=environment)
    # A Ctrl-C reaches the child from the terminal; we stay to look at what it leaves.
    signal.signal(signal.SIGINT, lambda _signum, _frame: None)
    for forwarded in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(forwarded, lambda signum, _frame: child.send_signal(signum))
    status = child.wait()
    status = status if status >= 0 else 128 - status

    processes = leftover_processes(run_id)
    sockets = leftover_sockets(folder)
    for pid, arguments in processes.items():
        print(f"left behind: process {pid}: {arguments}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in sockets:
        print(f"left behind: {path}", file=sys.stderr)
    if processes or sockets:
        status = status or 1
    if status == 0:
        shutil.rmtree(folder, ignore_errors=True)
    elif any(folder.iterdir()):
        print(f"temporary files are kept in {folder}", file=sys.stderr)
    else:
        folder.rmdir()
    return status


def leftover_processes(run_id: str) -> dict[int, str]:
    """Command line by pid of the processes of this run that are still there after GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    while True:
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):  # nothing on macOS
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if f"{MARKER}={run_id}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (
                        (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
                    )
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def leftover_sockets(folder: Path) -> list[Path]:
    """The runtime folders of our processes that a sweep leaves, and every socket."""
    for root in folder.glob("shardswarm-*"):
        sweep(root)
    runtime_folders = list(folder.glob("shardswarm-*/*"))
    sockets = [path for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
    return runtime_folders + sockets


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
