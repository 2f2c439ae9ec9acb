"""The network cut in two and healed: both halves go on, and then all follow the longer history.

Two namespaces with a cable between them; in each a node of both stages and a trainer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import LocalSwarm, Process, stop_all, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)
NUM_EPOCHS = 60  # the half that notices first runs on for seconds


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """Two namespaces, and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"st{os.getpid() % 10000}{side}" for side in "ab"]
        self.addresses = [f"10.79.{os.getpid() % 250 + 1}.{host}" for host in (1, 2)]

    def plug(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "cable", state)

    @contextlib.contextmanager
    def laid(self) -> Iterator[Cable]:
        for name in self.names:
            ip("netns", "add", name)
        try:
            ip(
                "link",
                "add",
                "cable",
                "netns",
                self.names[0],
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                self.names[1],
            )
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
            yield self
        finally:
            for name in self.names:
                ip("netns", "del", name)


def test_both_halves_of_a_cut_network_go_on_and_follow_the_longer_history_when_it_heals(
    tmp_path: Path, fault_root: Path, fork_server: ForkServer
) -> None:
    env = {"TMPDIR": str(fault_root)}
    store = make_run(
        tmp_path / "run", min_replicas=2, **{"end.epochs": NUM_EPOCHS, "target_batch": 16, "microbatch": 2}
    )
    with Cable().laid() as cable:
        listen = [f"/ip4/{address}/tcp/0" for address in cable.addresses]
        command = [sys.executable, "-m", "tests.support.in_namespace", cable.names[0], "bootstrap"]
        command += ["--listen", listen[0], "--identity", str(tmp_path / "id")]
        bootstrap = Process(command, tmp_path / "bootstrap.log", env, fork_server)
        swarm = LocalSwarm(tmp_path, bootstrap, env=env, fork_server=fork_server)
        try:
            training = TrainingSwarm(swarm, store, tmp_path / "run")
            halves: list[list[Process]] = []
            for name, address in zip(cable.names, listen, strict=True):
                disk = tmp_path / f"disk of {name}"  # no half finds what the other saved
                shutil.copytree(tmp_path / "run" / "cache", disk)
                where: Any = {"NETNS": name, "cache": disk}
                nodes = [training.start_node(stage, "--listen", address, **where) for stage in (0, 1)]
                halves.append([*nodes, training.start_trainer("--listen", address, **where)])
            everybody = [*halves[0], *halves[1]]

            def epochs(members: list[Process]) -> list[int]:
                return [max(training.steps_of(member), default=-1) for member in members]

            wait_until(lambda: min(epochs(everybody)) >= 2, 60, "all six train together")
            cable.plug("down")
            cut_at = max(epochs(everybody))
            for half in halves:
                wait_until(lambda half=half: min(epochs(half)) >= cut_at + 4, 60, "each half goes on")
            lineages = [training.steps_of(half[0])[cut_at + 4]["lineage"] for half in halves]
            assert lineages[0] != lineages[1], "the halves made histories of their own"
            members = {training.steps_of(half[0])[cut_at + 4]["members"] for half in halves}
            assert members == {3}
            cable.plug("up")

            def together() -> bool:
                return any(
                    training.steps_of(halves[0][0]).get(e, {}).get("members") == 6
                    for e in range(cut_at + 5, NUM_EPOCHS)
                )

            wait_until(together, 90, "all six train together again")
            wait_until(lambda: min(epochs(everybody)) == NUM_EPOCHS - 1, 90, "the run ends")
            last = [training.steps_of(member)[NUM_EPOCHS - 1] for member in everybody]
            assert len({line["lineage"] for line in last}) == 1
            assert sorted(bool(line["downloads"]) for line in last) in ([False] * 3 + [True] * 3, [True] * 6)
            expected = train_in_one_process(store.spec, samples_of_run(store, tmp_path / "run" / "data"))
            for nodes in (halves[0], halves[1]):
                assert largest_error(weights_of_run(training, nodes[:2], nodes[2]), expected.weights) < 1e-5
        finally:
            stop_all([*swarm.processes, bootstrap])
