"""Which blocks a node takes, who may serve one route together, and what happens when a hop's numeric class dies out."""

from __future__ import annotations

import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import swarm
from swarm.identity import Identity
from swarm.messages import PROTOCOL_MINOR
from tests.support.processes import Process, local_swarm, wait_until

PROMPT = torch.tensor([[5, 77, 130, 9]])


def greedy(model, num_tokens=8):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=num_tokens, do_sample=False)


def test_nodes_without_blocks_fill_the_gaps_even_when_they_start_together(tiny_path, fork_server, tmp_path):
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        started = [nodes.start_node(tiny_path, None, "--num-blocks", "2") for _ in range(2)]
        assert sorted(node.ready()["span"] for node in started) == ["0:2", "2:4"]
        # As much as fits the memory: all of it.
        whole = nodes.start_node(tiny_path, None, "--cache-mib", "8")
        assert whole.ready()["span"] == "0:4"


def test_a_node_that_chose_before_another_spoke_and_speaks_after_it_finds_out(tiny_path, fork_server, tmp_path):
    keys = [tmp_path / "one", tmp_path / "other"]
    small, large = sorted(keys, key=lambda path: Identity.load_or_create(path).peer_id)
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        fault = {"action": "SIGSTOP", "on": "announce"}
        late = nodes.start_node(tiny_path, None, "--num-blocks", "2", "--identity", str(small), fault=fault)
        wait_until(lambda: nodes.trace_of(late), 60, "it has chosen")
        other = nodes.start_node(tiny_path, None, "--num-blocks", "2", "--identity", str(large))
        assert other.ready()["span"] == "0:2"
        late.send(signal.SIGCONT)
        assert late.ready()["span"] == "2:4"
        assert [event["span"] for event in nodes.trace_of(late)] == ["0:2"]


def start_other_version(nodes, path, blocks, major, minor):
    command = [
        sys.executable,
        "-m",
        "tests.support.other_version_node",
        str(major),
        str(minor),
        "run",
        "--model",
        str(path),
    ]
    command += ["--blocks", blocks, "--initial-peers", nodes.bootstrap.address, "--threads", "1"]
    process = Process(command, nodes.folder / f"version{major}.{minor}.log", fork_server=nodes.fork_server)
    nodes.processes.append(process)
    return process


def test_versions_meet_or_refuse_clearly(tiny_path, fork_server, tmp_path):
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        newer = start_other_version(nodes, tiny_path, "0:2", 1, 7)
        foreign = start_other_version(nodes, tiny_path, "2:4", 2, 0)
        newer.ready(), foreign.ready()
        options = {"initial_peers": nodes.initial_peers, "model": str(tiny_path), "patience_s": 1.0}
        with swarm.connect(**options) as connected:
            with pytest.raises(
                swarm.RouteBroken, match=r"nobody serves blocks 2:4.*another version of the protocol than 1"
            ):
                greedy(connected.model())
        nodes.start_nodes(tiny_path, "2:4")
        with swarm.connect(**options) as connected:
            assert torch.equal(greedy(connected.model()), greedy(AutoModelForCausalLM.from_pretrained(tiny_path)))
            route = connected.model().last_session.last_route
            assert [hop.record.protocol_minor for hop in route] == [7, PROTOCOL_MINOR]


def test_a_session_leaves_its_numeric_class_only_when_nobody_of_it_is_left(tiny_path, fork_server, tmp_path):
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        victim = nodes.start_node(tiny_path, "0:4", fault={"action": "SIGKILL", "at_step": 4})
        other = nodes.start_node(tiny_path, "0:4", precision="bf16")
        victim.ready(), other.ready()
        with swarm.connect(initial_peers=nodes.initial_peers, model=str(tiny_path)) as connected:
            model = connected.model()
            connected.client.router.health.succeeded(other.peer_id, round_trip_s=5.0)  # so that the victim is chosen
            output = greedy(model)
            assert output.shape[1] == PROMPT.shape[1] + 8
            assert [event["action"] for event in nodes.trace_of(victim)] == ["SIGKILL"]
            stats = model.last_stats
            assert (stats.num_reroutes, stats.num_class_changes) == (1, 1)
            assert model.last_session.last_route[0].record.numeric_class == "bf16"
