"""A newcomer's download: how fast a run goes on meanwhile, against before and after, and how many epochs it lasts.

python benchmarks/joiner.py --json
2 stages, 2 nodes for the first and 1 for the second, 1 trainer; then, again and again, another node of the first stage with an empty disk,
which downloads the stage's state from the two. An epoch's length is the time between two steps in the trainer's log. Epochs in which the
newcomer's process starts and loads are left out, as it would have a machine of its own.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Threads that spin while they wait take the cores from whoever else computes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.report import print_report, spread
from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

_TIMEOUT_S = 300


def times_of(member: Process, line: str) -> list[float]:
    """When the log says so, in seconds."""
    found = re.findall(rf"^(\S+ \S+),(\d+) \w \S+ {line}", member.log, re.M)
    return [datetime.datetime.fromisoformat(day).timestamp() + int(ms) / 1000 for day, ms, *_ in found]


def wait_for_steps(trainer: Process, number: int) -> None:
    wait_until(lambda: len(times_of(trainer, "step ")) >= number, _TIMEOUT_S, "steps")


def wait_for_line(member: Process, line: str) -> None:
    wait_until(lambda: times_of(member, line), _TIMEOUT_S, line)


def lengths(steps: list[float], begin: float, end: float) -> list[float]:
    """Of the epochs that begin and end in between."""
    inside = [step for step in steps if begin <= step <= end]
    return [after - before for before, after in itertools.pairwise(inside)]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    size = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    rules = {"end.epochs": 100_000, "optimizer.schedule": "constant", "microbatch": 4, "checkpoint_every": 1000}
    store = make_run(folder / "run", config=size, **rules)
    fork_server = ForkServer()
    before, during, after, num_epochs, seconds = [], [], [], [], []
    num_bytes = 0
    with local_swarm(folder / "swarm", fork_server=fork_server) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        training = TrainingSwarm(swarm, store, folder / "run")
        for stage, number in ((0, 0), (0, 1), (1, 2)):
            training.start_node(
                stage, "--no-sessions", "--donor-mib", str(options.donor_mib), cache=folder / f"disk{number}"
            ).ready()
        trainer = training.start_trainer(cache=None)
        wait_for_steps(trainer, 5)
        for repeat in range(options.repeats):
            num_steps = len(times_of(trainer, "step "))
            wait_for_steps(trainer, num_steps + options.epochs)
            steps = times_of(trainer, "step ")
            before += lengths(steps, steps[num_steps], steps[-1])
            joiner = training.start_node(0, "--no-sessions", cache=folder / f"joiner{repeat}")
            wait_for_line(joiner, "state installed")
            begin, end = times_of(joiner, "missed a step, downloading")[0], times_of(joiner, "snapshot fetched")[0]
            steps = times_of(trainer, "step ")
            during += lengths(steps, begin, end)
            installed = re.search(r"state installed epoch=(\d+) of a snapshot of epoch=(\d+)", joiner.log)
            assert installed is not None
            num_epochs.append(int(installed[1]) - int(installed[2]))
            seconds.append(end - begin)
            num_bytes = 12 * int(joiner.ready()["num_parameters"])
            num_steps = len(steps)
            wait_for_steps(trainer, num_steps + options.epochs)
            steps = times_of(trainer, "step ")
            after += lengths(steps, steps[num_steps], steps[-1])
            joiner.stop()
    fork_server.close()
    return {
        "state_mib": round(num_bytes / 2**20, 1),
        "download_s": round(statistics.median(seconds), 2),
        "epochs_during_download": statistics.median(num_epochs),
        "epoch_alone_s": spread(before),
        "epoch_during_download_s": spread(during),
        "epoch_with_it_s": spread(after),
        "ratio_of_speed_to_alone": round(statistics.median(before) / statistics.median(during), 3),
        "ratio_of_speed_to_with_it": round(statistics.median(after) / statistics.median(during), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20, help="alone, before each newcomer")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--donor-mib", type=float, default=32.0, help="MiB/s that each donor gives")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="joiner-") as folder:
        results = measure(options, Path(folder))
    print_report("joiner", vars(options), results, as_json=options.json)


if __name__ == "__main__":
    main()
