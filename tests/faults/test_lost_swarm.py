"""Bootstrap peers that die, and all nodes at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList

import swarm
from tests.faults.conftest import FAST, NUM_TOKENS, PROMPTS, AtToken, Reference, Victims, client_of
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.processes import LocalSwarm, Process, local_swarm


@pytest.fixture(scope="module")
def own_swarm(
    tiny_path: Path, fault_root: Path, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalSwarm]:
    """A swarm whose bootstrap peers may die."""
    env = {"TMPDIR": str(fault_root)}
    with local_swarm(tmp_path_factory.mktemp("bootstraps"), env=env, fork_server=fork_server) as started:
        yield started


def kill(process: Process) -> None:
    process.send(signal.SIGKILL)
    assert process.wait(5) == -signal.SIGKILL


def test_the_swarm_outlives_its_bootstrap_peers(own_swarm: LocalSwarm, tiny_path: Path, reference: Reference) -> None:
    """Two of them, killed one after the other in mid-generation; then a node's address is as good as theirs."""
    first = own_swarm.bootstrap
    second = own_swarm.start_bootstrap("second", "--initial-peers", first.address)
    both = [first.address, second.address]
    started = [own_swarm.start_node(tiny_path, span, initial_peers=both) for span in ("0:2", "2:4")]
    for node in started:
        node.ready()
    with client_of(own_swarm, tiny_path, initial_peers=both[:1]) as client:
        model = client.model()
        for bootstrap in (first, second):
            killing = StoppingCriteriaList([AtToken(4, lambda victim=bootstrap: kill(victim))])
            ours = reference.generate(model, stopping_criteria=killing)
            assert torch.equal(ours, reference.generate(reference.local)) and not bootstrap.is_running()
            assert model.last_stats.num_reroutes == 0
            reference.assert_same(model, PROMPTS[1])  # a new session of the same client
            for initial_peers in ([*both, started[0].address], [started[1].address]):
                with client_of(own_swarm, tiny_path, initial_peers=initial_peers) as newcomer:
                    reference.assert_same(newcomer.model())
    joined = own_swarm.start_node(tiny_path, "0:4", s_per_block=FAST, initial_peers=[started[0].address])
    joined.ready()
    with client_of(own_swarm, tiny_path, initial_peers=[started[1].address]) as newcomer:
        reference.assert_same(newcomer.model())
        assert newcomer.model().last_session.last_route[0].peer_id == joined.peer_id


def test_nodes_find_back_to_a_bootstrap_peer_that_was_restarted(
    fault_root: Path, fork_server: ForkServer, tiny_path: Path, tmp_path: Path, reference: Reference
) -> None:
    """The only one, killed and started again with the same identity and port: same address, and soon the nodes' records."""
    env = {"TMPDIR": str(fault_root)}
    with local_swarm(tmp_path, env=env, fork_server=fork_server) as alone:
        fixed = alone.start_bootstrap("fixed")
        address = fixed.address
        port = address.split("/tcp/")[1].split("/")[0]
        flags = ("--record-lifetime", "3")
        started = [alone.start_node(tiny_path, span, *flags, initial_peers=[address]) for span in ("0:2", "2:4")]
        for node in started:
            node.ready()
        kill(fixed)
        again = alone.start_bootstrap("fixed", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
        assert again.address == address
        with client_of(alone, tiny_path, initial_peers=[address], patience_s=20.0) as client:
            reference.assert_same(client.model())


def test_when_all_nodes_are_dead_the_error_says_what_is_missing_and_the_same_session_goes_on_later(
    victims: Victims, nodes: LocalSwarm, tmp_path: Path, reference: Reference
) -> None:
    path = save_tiny("llama", tmp_path / "lonely", seed=3)
    local = AutoModelForCausalLM.from_pretrained(path).eval()
    low, high = victims.start("0:2", "2:4", model=path)
    nodes.plant(high, "SIGKILL", 5)
    low_was_killed = AtToken(4, lambda: kill(low))
    timeout_s = 4.0
    with client_of(nodes, path, request_timeout_s=timeout_s) as client:
        model = client.model()
        with model.session(max_length=64) as cache:
            started = time.monotonic()
            with pytest.raises(swarm.RouteBroken) as broken:
                reference.generate(model, stopping_criteria=StoppingCriteriaList([low_was_killed]))
            assert time.monotonic() - started < timeout_s + 3.0
            message = str(broken.value)
            assert "nobody serves" in message and "lonely" in message and "blocks 0:" in message, message
            assert "start a node: swarm-node run --model lonely --initial-peers /ip4/" in message, message
            session, length = cache.session, cache.get_seq_length()
            assert not low.is_running() and session.position == length > 3
            victims.start("0:4", model=path)
            ours = reference.generate(model)
            assert cache.session is session and not session.stats.num_class_changes
            assert torch.equal(ours, reference.generate(local)) and ours.shape[1] >= NUM_TOKENS


def test_a_step_that_ran_out_of_time_can_be_repeated(
    victims: Victims, nodes: LocalSwarm, tmp_path: Path, reference: Reference
) -> None:
    """Its only node was too slow. What it still computes for the step that was given up does not keep it from serving the next."""
    path = save_tiny("llama", tmp_path / "slow", seed=4)
    local = AutoModelForCausalLM.from_pretrained(path).eval()
    (node,) = victims.start("0:4", model=path)
    nodes.plant(node, "slow", 5, delay_s=30.0)
    with client_of(nodes, path, request_timeout_s=3.0) as client:
        model = client.model()
        with model.session(max_length=64) as cache:
            with pytest.raises(swarm.RouteBroken, match=r"does not answer the step, and nobody serves blocks 0:4"):
                reference.generate(model)
            session = cache.session
            nodes.plant(node, None)
            # The node is avoided for FIRST_BAN_S; until then there is nobody else.
            deadline = time.monotonic() + 15
            while True:
                try:
                    ours = reference.generate(model)
                    break
                except swarm.RouteBroken:
                    assert time.monotonic() < deadline
            assert cache.session is session
            assert torch.equal(ours, reference.generate(local))
