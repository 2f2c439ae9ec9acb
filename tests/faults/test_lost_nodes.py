"""Nodes that vanish or freeze in mid-generation: the text is the one without the fault, and the loss is counted."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList

from swarm.client.session import SessionStats
from tests.faults.conftest import (
    FAST,
    MIDDLE,
    NUM_TOKENS,
    PROMPT,
    PROMPTS,
    QUICK_STALL_S,
    SLOW,
    AtToken,
    Observer,
    Reference,
    Victims,
    client_of,
)
from tests.support.processes import LocalSwarm, Process

MOMENTS = {"prefill": 1, "the middle": 5, "the last step": NUM_TOKENS}
WAYS: dict[str, tuple[str | list[str], dict[str, Any]]] = {
    "a batch with left padding": (PROMPTS, {}),
    "beam search": (PROMPT, {"num_beams": 3}),
    "beam search over a padded batch": (PROMPTS, {"num_beams": 2, "num_return_sequences": 2}),
    "sampling": (PROMPTS[:2], {"do_sample": True, "temperature": 0.9}),
    "prompt lookup": ("the quick brown the quick brown the quick", {"prompt_lookup_num_tokens": 3}),
}


def assert_stalled(stats: SessionStats, num_reroutes: int, at_most_s: float) -> None:
    assert stats.num_reroutes == num_reroutes
    assert 0 < stats.stall_s < at_most_s
    assert stats.num_class_changes == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_text_is_the_same_when_a_node_is_killed(
    moment: str, victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    (victim,) = victims.start("0:2", fault={"action": "SIGKILL", "at_step": MOMENTS[moment]})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        assert victim.wait(5) == -signal.SIGKILL
        event = victims.assert_fired(victim, "SIGKILL", MOMENTS[moment])
        assert event["hop"] == "0:2" and (event["position"] == 0) == (moment == "prefill")
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
        # The client goes on as if nothing had been, now without the dead one.
        reference.assert_same(model, PROMPTS[1])
        assert model.last_stats.num_reroutes == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_text_is_the_same_when_a_node_is_frozen(
    moment: str, victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    """Its sockets stay open; only the unanswered ping tells. With the times that a user gets unless he says otherwise."""
    (victim,) = victims.start("2:4", fault={"action": "SIGSTOP", "at_step": MOMENTS[moment]})
    with client_of(nodes, tiny_path) as client:
        model, config = client.model(), client.client.config
        reference.assert_same(model)
        victims.assert_fired(victim, "SIGSTOP", MOMENTS[moment])
        found_s = config.stall_s + config.ping_timeout_s
        assert_stalled(model.last_stats, 1, found_s + QUICK_STALL_S)
        assert model.last_stats.stall_s >= config.ping_timeout_s


@pytest.mark.parametrize("action", ["SIGKILL", "refuse"])
def test_all_whose_steps_share_a_nodes_batches_go_on_elsewhere_when_it_is_lost(
    action: str, victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    """Six generations of two clients, half done."""
    texts = [f"{prompt} number {number}" for number, prompt in enumerate([*PROMPTS, *PROMPTS])]
    at_step = len(texts) * NUM_TOKENS // 2
    (victim,) = victims.start("0:2", fault={"action": action, "at_step": at_step})
    with client_of(nodes, tiny_path) as one, client_of(nodes, tiny_path) as other:
        models = [client.model() for client in (one, other)]
        with ThreadPoolExecutor(len(texts)) as pool:
            ours = list(pool.map(reference.generate, models * (len(texts) // 2), texts))
        assert all(
            torch.equal(text, reference.generate(reference.local, own)) for text, own in zip(ours, texts, strict=True)
        )
        # Nobody was blamed for what another's session lost.
        for model in models:
            reference.assert_same(model)
            assert model.last_stats.num_reroutes == 0
    event = victims.assert_fired(victim, action, at_step)
    assert event["sessions"] > 1 and event["batched"] > event["batches"] > 0, "they shared batches"


def test_a_frozen_node_that_wakes_up_serves_again(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path, observer: Observer
) -> None:
    (victim,) = victims.start("0:2", fault={"action": "SIGSTOP", "at_step": 3})
    with client_of(nodes, tiny_path, stall_s=0.2, ping_timeout_s=0.5) as client:
        reference.assert_same(client.model())
    victims.assert_fired(victim, "SIGSTOP", 3)
    victim.send(signal.SIGCONT)
    observer.wait_for_sessions(victim, 0, 5)
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        assert model.last_stats.num_reroutes == 0
        assert model.last_session.last_route[0].peer_id == victim.peer_id


def test_two_nodes_are_lost_in_one_generation(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    first = victims.nodes.start_node(tiny_path, "0:2", s_per_block=FAST, fault={"action": "SIGKILL", "at_step": 3})
    victims.started.append(first)
    (second,) = victims.start("2:4", fault={"action": "SIGKILL", "at_step": 7})
    first.ready()
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        victims.assert_fired(first, "SIGKILL", 3)
        victims.assert_fired(second, "SIGKILL", 7)
        assert_stalled(model.last_stats, 2, 2 * QUICK_STALL_S)


def test_a_replacement_that_dies_in_the_replay_is_replaced_too(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    (first,) = victims.start("0:2", fault={"action": "SIGKILL", "at_step": 4})
    (second,) = victims.start("0:2", s_per_block=MIDDLE, fault={"action": "SIGKILL", "at_step": 1})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        victims.assert_fired(first, "SIGKILL", 4)
        victims.assert_fired(second, "SIGKILL", 1)
        assert_stalled(model.last_stats, 1, 2 * QUICK_STALL_S)


def test_a_lost_hop_is_replaced_by_two_of_other_spans(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    """0:3 is lost; 0:1 and 1:4 take over, the latter with a part of its span."""
    (first, last) = victims.start("0:1", "1:4", s_per_block=MIDDLE)
    (victim, end) = victims.start("0:3", "3:4")
    victims.nodes.plant(victim, "SIGKILL", 5)
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        victims.assert_fired(victim, "SIGKILL", 5)
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
        route = [(hop.peer_id, str(hop.span)) for hop in model.last_session.last_route]
    assert route == [(first.peer_id, "0:1"), (last.peer_id, "1:3"), (end.peer_id, "3:4")]


def test_the_neighbours_of_a_lost_hop_can_take_its_blocks_over(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path, honest: list[Process]
) -> None:
    """1:3 is lost between 0:1 and 3:4, which the honest nodes of 0:2 and 2:4 serve: each gets a second hop of this session."""
    (victim,) = victims.start("1:3", fault={"action": "SIGKILL", "at_step": 5})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        victims.assert_fired(victim, "SIGKILL", 5)
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
        route = [(hop.peer_id, str(hop.span)) for hop in model.last_session.last_route]
    low, high = (node.peer_id for node in honest)
    assert route == [(low, "0:1"), (low, "1:2"), (high, "2:3"), (high, "3:4")]


def test_a_peer_can_have_two_hops_of_a_route_and_lose_the_one_between(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    (whole,) = victims.start("0:4", s_per_block=(MIDDLE + SLOW) / 2)
    (victim,) = victims.start("1:3", fault={"action": "SIGKILL", "at_step": 5})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        victims.assert_fired(victim, "SIGKILL", 5)
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
        route = [(hop.peer_id, str(hop.span)) for hop in model.last_session.last_route]
    assert route == [(whole.peer_id, "0:1"), (whole.peer_id, "1:3"), (whole.peer_id, "3:4")]


@pytest.mark.parametrize("way", WAYS)
def test_a_replay_rebuilds_padding_and_beams(
    way: str, victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    prompts, options = WAYS[way]
    (victim,) = victims.start("2:4", fault={"action": "SIGKILL", "at_step": 6 if way != "prompt lookup" else 3})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model, prompts, **options)
        assert model.last_stats.num_reroutes == 1
    victims.assert_fired(victim, "SIGKILL", 6 if way != "prompt lookup" else 3)


def test_a_node_that_is_told_to_leave_finishes_what_runs(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    (victim,) = victims.start("0:2", flags=("--drain-timeout", "20"), fault={"action": "SIGTERM", "at_step": 3})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        assert model.last_stats.num_reroutes == 0
        assert model.last_session.last_route[0].peer_id == victim.peer_id
        assert victim.wait(5) == 0, victim.log
    victims.assert_fired(victim, "SIGTERM", 3)
    assert "Traceback" not in victim.log


def test_a_node_that_leaves_before_the_end_is_replaced(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    """It waits for nobody, and is gone before the client has its sixth token."""
    (victim,) = victims.start("0:2", flags=("--drain-timeout", "0.1"), fault={"action": "SIGTERM", "at_step": 3})
    until_it_left = StoppingCriteriaList([AtToken(5, lambda: victim.wait(20))])
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        ours = reference.generate(model, stopping_criteria=until_it_left)
        assert torch.equal(ours, reference.generate(reference.local))
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
    victims.assert_fired(victim, "SIGTERM", 3)
    assert victim.wait(0) == 0, victim.log
    assert "Traceback" not in victim.log


def test_a_node_whose_network_daemon_dies_says_so_and_ends(
    victims: Victims, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    (victim,) = victims.start("0:2", fault={"action": "kill_p2pd", "at_step": 4})
    with client_of(nodes, tiny_path) as client:
        model = client.model()
        reference.assert_same(model)
        assert_stalled(model.last_stats, 1, QUICK_STALL_S)
    victims.assert_fired(victim, "kill_p2pd", 4)
    assert victim.wait(10) == 1, victim.log
    said = [line for line in victim.log.splitlines() if line.startswith("swarm-node: ")]
    assert said == ["swarm-node: the network daemon (p2pd) of this node died; start the node again"]
    assert victim.log.splitlines()[-1] == said[0] and "Traceback" not in victim.log, victim.log
