"""A swarm on this machine: one bootstrap peer, three nodes with a third of the blocks each, and one question to it.

With --train it trains a model instead: see demo_training.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from demo_processes import BIN, DemoError, DemoSwarm, make_log_folder
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

MODEL = "smollm2-135m"
SPANS = ("0:10", "10:20", "20:30")
PROMPT = "What is the capital of France, and what is it famous for?"


def ask(swarm: DemoSwarm, prompt: str, *, keep: bool) -> None:
    swarm.attached("the download of the weights", "swarm", "cache", "fetch", MODEL)
    address = start_nodes(swarm)
    swarm.console.print(f"Asking: {prompt}\n", highlight=False, markup=False)
    question = ("swarm", "generate", "--chat", "--initial-peers", address, "--model", MODEL, prompt)
    swarm.attached("the generation", *question)
    swarm.console.print(f"\nLogs: {swarm.logs}", highlight=False, soft_wrap=True)
    if not keep:
        return
    node = (str(BIN / "swarm-node"), "run", "--model", MODEL, "--initial-peers", address)
    swarm.console.print("\nThe swarm stays up until Ctrl-C. From another terminal on this machine:", highlight=False)
    for command in ((str(BIN / question[0]), *question[1:]), node):
        print(f"  {shlex.join(command)}", flush=True)
    while True:
        swarm.wait()


def start_nodes(swarm: DemoSwarm) -> str:
    """Start the processes and wait until all serve; returns the address of the bootstrap peer."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=swarm.console) as progress:
        task = progress.add_task("Starting the bootstrap peer", total=1 + len(SPANS))
        address = swarm.start_bootstrap()
        progress.update(task, advance=1, description="Three nodes load their blocks")
        nodes = [
            swarm.start(
                f"node-{span.replace(':', '-')}", "swarm-node", "run",
                "--model", MODEL, "--blocks", span, "--initial-peers", address,
            )
            for span in SPANS
        ]  # fmt: skip
        swarm.wait_ready(nodes, lambda num_ready: progress.update(task, completed=1 + num_ready))
        progress.update(task, description="All blocks are served")
    return address


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A swarm on this machine answers one prompt.")
    parser.add_argument("prompt", nargs="?", help="what to ask; the default is a built-in question")
    parser.add_argument("--keep", action="store_true", help="leave the swarm running until Ctrl-C")
    parser.add_argument("--train", action="store_true", help="train a small model instead, and kill a node on the way")
    options = parser.parse_args()
    if options.train and (options.prompt or options.keep):
        parser.error("--train takes no prompt and no --keep")
    try:
        swarm = DemoSwarm(make_log_folder())
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        if options.train:
            from demo_training import train

            train(swarm)
        else:
            ask(swarm, options.prompt or PROMPT, keep=options.keep)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopping ...", file=sys.stderr)
    finally:
        swarm.stop()
    return 0 if swarm.stop_signal is None else 128 + swarm.stop_signal


if __name__ == "__main__":
    sys.exit(main())
