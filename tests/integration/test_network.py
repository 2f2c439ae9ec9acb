"""Real hosts: network namespaces joined by veth pairs. The middle host is the bootstrap peer; the two others cannot reach each other.

node's host 10.77.x.2 --- 10.77.x.1 [bootstrap] 10.78.x.1 --- 10.78.x.2 client's host
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.models import save_tiny
from tests.support.probes import run_python
from tests.support.processes import Process, stop_all

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


class Hosts:
    """Three namespaces in a row."""

    def __init__(self) -> None:
        self.tag = f"ss{os.getpid() % 10000}"
        self.octet = os.getpid() % 250 + 1
        self.left, self.middle, self.right = (f"{self.tag}{side}" for side in "lmr")

    def __enter__(self):
        for name in (self.left, self.middle, self.right):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for side, net in ((self.left, 77), (self.right, 78)):
            inner, outer = f"{side}i", f"{side}o"
            _ip("link", "add", inner, "netns", side, "type", "veth", "peer", "name", outer, "netns", self.middle)
            for name, device, host in ((side, inner, 2), (self.middle, outer, 1)):
                _ip("-n", name, "addr", "add", f"10.{net}.{self.octet}.{host}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_):
        for name in (self.left, self.middle, self.right):
            _ip("netns", "del", name)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def inside(name, *arguments):
    return ["-m", "tests.support.in_namespace", name, *arguments]


def test_a_node_that_nobody_can_reach_serves_through_the_bootstrap_peers_relay(tmp_path, fork_server):
    model = str(save_tiny("llama", tmp_path / "tiny"))
    processes = []

    def start(name, host, *arguments):
        command = [sys.executable, *inside(host, *arguments)]
        processes.append(Process(command, tmp_path / f"{name}.log", fork_server=fork_server))
        return processes[-1]

    with Hosts() as hosts:
        try:
            everywhere = ["--listen", "/ip4/0.0.0.0/tcp/0"]
            port = "/ip4/0.0.0.0/tcp/31337"
            bootstrap = start(
                "bootstrap", hosts.middle, "bootstrap", "--listen", port, "--identity", str(tmp_path / "id")
            )
            from_left, from_right = (
                f"/ip4/10.{net}.{hosts.octet}.1/tcp/31337/p2p/{bootstrap.peer_id}" for net in (77, 78)
            )
            run = ["node", "run", "--model", model, "--precision", "fp32", *everywhere]
            both = ["--initial-peers", from_right, "--initial-peers", from_left]
            node = start("relayed", hosts.left, *run, "--blocks", "0:2", "--relay", *both, "--join-timeout", "20")
            direct = start("direct", hosts.middle, *run, "--blocks", "2:4", "--initial-peers", from_left)
            node.ready(), direct.ready()
            command = ["swarm", "generate", "--model", model, "--initial-peers", from_right]
            done = run_python(
                *inside(hosts.right, *command, "--max-new-tokens", "8", "--json", "hello"), fork_server=fork_server
            )
            assert done.code == 0, done.err + node.log[-1000:]
            answer = json.loads(done.out)
            assert len(answer["token_ids"]) == 8 and len(answer["route"]) == 2
            assert node.peer_id[-8:] in answer["route"][0]
        finally:
            stop_all(processes)
