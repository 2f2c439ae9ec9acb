"""A node with one changed tensor never gets a session, however fast it is."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import swarm
from swarm.checkpoint import Checkpoint
from tests.faults.conftest import Observer, Reference, Victims, client_of
from tests.support.models import save_tiny
from tests.support.processes import LocalSwarm, Process


def copy_with_one_change(path: Path, to: Path, tensor: str) -> Path:
    """A copy of a checkpoint in which one element of one tensor differs."""
    shutil.copytree(path, to)
    weights = load_file(to / "model.safetensors")
    weights[tensor].view(-1)[5] += 0.25
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def changed_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed") / "tiny-changed"
    return copy_with_one_change(tiny_path, folder, "model.layers.2.mlp.up_proj.weight")


def assert_never_used(node: Process, observer: Observer) -> None:
    status = observer.status(node)
    assert (status.num_sessions, status.num_steps) == (0, 0)
    assert "session opened" not in node.log


def test_the_fastest_node_with_one_changed_tensor_gets_no_session(
    victims: Victims,
    nodes: LocalSwarm,
    reference: Reference,
    tiny_path: Path,
    changed_path: Path,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not even for its blocks that are right."""
    whole, part = victims.start("0:4", "2:3", model=changed_path)
    with client_of(nodes, tiny_path) as client, caplog.at_level(logging.WARNING, "swarm"):
        reference.assert_same(client.model())
        route = client.model().last_session.last_route
        assert {whole.peer_id, part.peer_id}.isdisjoint(hop.peer_id for hop in route)
    assert_never_used(whole, observer)
    assert_never_used(part, observer)
    (said,) = [r.getMessage() for r in caplog.records if "other weights" in r.getMessage()]
    assert "block 2" in said and "dir:tiny-changed" in said and "2 peer(s)" in said


def test_the_only_node_of_a_block_with_a_changed_tensor_gets_no_session(
    victims: Victims, nodes: LocalSwarm, tmp_path: Path, observer: Observer, reference: Reference
) -> None:
    """Nor when a lost node could be replaced by it."""
    ours = save_tiny("llama", tmp_path / "ours", seed=5)
    theirs = copy_with_one_change(ours, tmp_path / "theirs", "model.layers.1.self_attn.q_proj.weight")
    (good, changed) = (victims.start("0:4", model=path)[0] for path in (ours, theirs))
    nodes.plant(good, "SIGKILL", 4)
    with client_of(nodes, ours, request_timeout_s=5.0) as client:
        for attempt in ("in mid-generation", "from the start"):
            started = time.monotonic()
            with pytest.raises(swarm.RouteBroken) as broken:
                reference.generate(client.model())
            message = str(broken.value)
            assert time.monotonic() - started < 5.0 + 3.0, attempt
            assert "dir:theirs" in message and f"yours are from {client.client.checkpoint.source}" in message, message
            assert "blocks" in message and "start a node: swarm-node run" in message, message
            assert "\n" not in message
    victims.assert_fired(good, "SIGKILL", 4)
    assert_never_used(changed, observer)


def test_a_client_without_the_blocks_believes_the_majority_and_nobody_on_a_tie(
    victims: Victims,
    nodes: LocalSwarm,
    tmp_path: Path,
    observer: Observer,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = save_tiny("llama", tmp_path / "ours", seed=6)
    theirs = copy_with_one_change(ours, tmp_path / "theirs", "model.layers.1.self_attn.q_proj.weight")
    monkeypatch.setattr(Checkpoint, "expected_digests", lambda _: None)  # as of a hub model whose blocks are not here
    (changed,) = victims.start("0:4", model=theirs)
    (first,) = victims.start("0:4", model=ours)
    with client_of(nodes, ours, request_timeout_s=3.0) as client:
        with pytest.raises(swarm.RouteBroken) as broken:
            reference.generate(client.model())
        message = str(broken.value)
        assert "blocks 1:2" in message and "dir:ours" in message and "dir:theirs" in message, message
    (second,) = victims.start("0:4", model=ours)
    with client_of(nodes, ours) as client:
        reference.generate(client.model())
        assert client.model().last_session.last_route[0].peer_id in (first.peer_id, second.peer_id)
    assert_never_used(changed, observer)
