"""A real node for benchmarks of its start and its memory, which writes down how long each phase of its start took, and what it imported.

    python -m benchmarks.timed_node run ARGUMENTS of swarm-node run
TRACE (a file) gets a line of JSON for each phase: its seconds by the clock and of this process's CPU. STARTED_AT: the monotonic clock when
the process was started. MODULES (a file) gets the names of all modules when the process ends.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_last = {"wall_s": float(os.environ["STARTED_AT"]), "cpu_s": 0.0}


def end_phase(name: str) -> None:
    """Write down how long it is since the phase before ended."""
    now = {"wall_s": time.monotonic(), "cpu_s": time.process_time()}
    with open(os.environ["TRACE"], "a") as file:
        file.write(json.dumps({"phase": name, **{key: now[key] - _last[key] for key in now}}) + "\n")
    _last.update(now)


def begins_after(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose first call ends a phase."""
    phases = [phase]

    def call(*args: Any, **options: Any) -> Any:
        if phases:
            end_phase(phases.pop())
        return function(*args, **options)

    return call


def time_phases() -> None:
    """Each function is where a phase has ended."""
    from node import runtime, shard

    build, load_engine, measure = shard.SpanModel, runtime.load_engine, runtime.measure_throughput

    def built(*args: Any, **options: Any) -> Any:
        end_phase("read and hash")
        model = build(*args, **options)
        end_phase("build")
        return model

    def engine_loaded(*args: Any, **options: Any) -> Any:
        end_phase("self-check")
        engine = load_engine(*args, **options)
        end_phase("load engine")
        return engine

    def measured(*args: Any, **options: Any) -> Any:
        throughput = measure(*args, **options)
        end_phase("measure throughput")
        return throughput

    runtime.running_host = begins_after("imports", runtime.running_host)
    runtime.Directory.join = begins_after("start p2pd", runtime.Directory.join)  # type: ignore[method-assign]
    node: Any = runtime.Node
    node._open_checkpoint = begins_after("join", node._open_checkpoint)
    node._claim_span = begins_after("open checkpoint", node._claim_span)
    runtime.load_shard = begins_after("announce JOINING", runtime.load_shard)
    shard.SpanModel = built  # type: ignore[assignment,misc]
    runtime.load_engine = engine_loaded
    runtime.measure_throughput = measured
    runtime._print_ready = begins_after("announce ONLINE", runtime._print_ready)


def main() -> None:
    from node import cli

    modules = Path(os.environ["MODULES"])
    atexit.register(lambda: modules.write_text("\n".join(sys.modules)))
    run_in_context = cli.quick_imports

    class TimedImports:
        """In the place of the context in which the node imports its runtime."""

        def __enter__(self) -> None:
            end_phase("interpreter and arguments")
            self._context = run_in_context()
            self._context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self._context.__exit__(*error)
            time_phases()

    cli.quick_imports = TimedImports  # type: ignore[assignment,misc]
    cli.main()


if __name__ == "__main__":
    main()
