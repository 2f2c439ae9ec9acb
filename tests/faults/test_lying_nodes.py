"""Nodes that answer nonsense, or nothing: blamed and replaced within a bound, and the text is the one without them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import swarm
from swarm.health import BLAME_FACTOR, FIRST_BAN_S
from tests.faults.conftest import FAST, QUICK_STALL_S, Observer, Reference, client_of
from tests.support.processes import LocalSwarm, Process

LIES = {
    "nan": "answered nonsense",
    "wrong_shape": "answered nonsense",
    "wrong_dtype": "answered nonsense",
    "wrong_position": "answered for position",
    "garbage": "malformed reply",
    "truncate": "malformed reply",
    "giant_header": "malformed reply",
    "giant_frame": "announced a frame of 2147483648 bytes",
    "refuse": "the computation failed",
}
REQUEST_TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def liar(nodes: LocalSwarm, honest: list[Process], tiny_path: Path) -> Iterator[Process]:
    """The fastest node of blocks 0:2, which answers as it is told."""
    (node,) = nodes.start_nodes(tiny_path, "0:2", s_per_block=FAST)
    yield node
    nodes.plant(node, None)
    node.stop()


def ban_left_s(client: swarm.Swarm, node: Process) -> float:
    return client.client.router.health.peers[node.peer_id].banned_until - time.monotonic()


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("at_step", [1, 4], ids=["prefill", "decoding"])
def test_a_lie_is_blamed_and_does_not_change_the_text(
    lie: str,
    at_step: int,
    liar: Process,
    nodes: LocalSwarm,
    reference: Reference,
    tiny_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with client_of(nodes, tiny_path) as client, caplog.at_level(logging.WARNING, "swarm"):
        fault_id = nodes.plant(liar, lie, at_step)
        model = client.model()
        reference.assert_same(model)
        event = nodes.trace_of(liar)[-1]
        assert (event["id"], event["action"], event["step"]) == (fault_id, lie, at_step)
        assert model.last_stats.num_reroutes == 1 and 0 < model.last_stats.stall_s < QUICK_STALL_S
        assert ban_left_s(client, liar) > FIRST_BAN_S * BLAME_FACTOR / 2
        (lost,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("hop lost")]
        assert f"peer={liar.peer_id[-8:]}" in lost and LIES[lie] in lost


@pytest.mark.parametrize("fault", ["silence", "mute"])
def test_a_node_that_is_alive_and_never_answers_costs_half_of_the_deadline_at_most(
    fault: str, liar: Process, nodes: LocalSwarm, reference: Reference, tiny_path: Path
) -> None:
    """It answers pings, so it might compute: it gets half of the time, and its replacement the other half."""
    with client_of(nodes, tiny_path, request_timeout_s=REQUEST_TIMEOUT_S) as client:
        fault_id = nodes.plant(liar, fault, 4)
        model = client.model()
        reference.assert_same(model)
        assert nodes.trace_of(liar)[-1]["id"] == fault_id
        assert model.last_stats.num_reroutes == 1
        assert 0.4 * REQUEST_TIMEOUT_S < model.last_stats.stall_s < 0.5 * REQUEST_TIMEOUT_S + 2.0
        assert ban_left_s(client, liar) < FIRST_BAN_S * BLAME_FACTOR / 2
    if fault == "mute":  # a new client cannot even open a session there
        with client_of(nodes, tiny_path, request_timeout_s=20.0) as client:
            started = time.monotonic()
            reference.assert_same(client.model())
            assert time.monotonic() - started < 5.0 + QUICK_STALL_S
            assert client.model().last_session.last_route[0].peer_id != liar.peer_id


def test_sessions_beside_the_lie_do_not_notice(
    liar: Process,
    honest: list[Process],
    nodes: LocalSwarm,
    reference: Reference,
    tiny_path: Path,
    observer: Observer,
) -> None:
    """Three clients at once over the same nodes, of which one lies in turn; nothing stays open."""
    nodes.plant(liar, "wrong_shape", 7)
    with ThreadPoolExecutor(3) as pool:

        def generate(_: int) -> int:
            with client_of(nodes, tiny_path) as client:
                model = client.model()
                outputs = [reference.generate(model) for _ in range(2)]
                assert all((output == expected).all() for output in outputs)
                return int(model.last_stats.num_reroutes)

        expected = reference.generate(reference.local)
        list(pool.map(generate, range(3)))
    assert nodes.trace_of(liar)[-1]["step"] == 7
    for node in (liar, *honest):
        observer.wait_for_sessions(node, 0, 5)
