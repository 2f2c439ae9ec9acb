"""Each bad input ends in bounded time with one line that names the cause and the next step, through the command lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import swarm as api
from swarm.client.connect import open_swarm
from swarm.identity import Identity
from swarm.span import Span
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.probes import START_S, ProgramRuns, node_probe
from tests.support.processes import LocalSwarm, Process, local_swarm

TIMEOUT_S = 4
SOMEBODY = Identity.generate().peer_id
NO_ROUTE_NEXT = "start a node: swarm-node run --model"


def change_a_block(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with one tensor of block 2 changed; config and ends are the same."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    name = next(key for key in weights if ".layers.2." in key)
    weights[name] = weights[name] + torch.tensor(0.5)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def swarm(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with local_swarm(tmp_path_factory.mktemp("bad_input"), fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="module")
def folder(swarm: LocalSwarm) -> Path:
    """Checkpoints: tiny, gap, full, lonely, two others that are called tiny, and some that are damaged."""
    folder = swarm.folder
    for seed, name in enumerate(("tiny", "gap", "full", "lonely", "doomed", "others/tiny")):
        save_tiny("llama", folder / name, seed=seed)
    change_a_block(folder / "tiny", folder / "changed" / "tiny")
    for name in ("truncated", "no_config"):
        shutil.copytree(folder / "tiny", folder / name)
    weights = folder / "truncated" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (folder / "no_config" / "config.json").write_text("{ not json")
    (folder / "bad.identity").write_bytes(b"not a key")
    return folder


@pytest.fixture(scope="module")
def nodes(swarm: LocalSwarm, folder: Path) -> dict[str, Process]:
    nodes = {
        "tiny": swarm.start_node(folder / "tiny", "0:4", "--cache-mib", "1"),
        "gap": swarm.start_node(folder / "gap", "0:2"),
        "full": swarm.start_node(folder / "full", "0:4", "--max-sessions", "2", "--max-sessions-per-peer", "1"),
        "doomed": swarm.start_node(folder / "doomed", "0:4", "--record-lifetime", "300"),
    }
    for node in nodes.values():
        node.ready()
    nodes["doomed"].send(signal.SIGKILL)
    return nodes


@pytest.fixture(scope="module")
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def runs(
    fork_server: ForkServer,
    swarm: LocalSwarm,
    folder: Path,
    nodes: dict[str, Process],
    silent_port: int,
    closed_port: int,
) -> Iterator[ProgramRuns]:
    """All command lines of this file, under way beside each other."""
    runs = ProgramRuns(fork_server, at_once=8)  # they wait most of their time
    offline = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port}", "HF_HUB_OFFLINE": "0"}
    here = swarm.bootstrap.address
    at_closed_port = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{SOMEBODY}"
    at_silent_port = f"/ip4/127.0.0.1/tcp/{silent_port}/p2p/{SOMEBODY}"
    wrong_id = here.rpartition("/")[0] + f"/{SOMEBODY}"

    def generate(
        name: str,
        model: object,
        prompt: str = "hello",
        peers: str = here,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ) -> None:
        flags = ["--model", str(model), "--initial-peers", peers, "--timeout", str(timeout_s), "--max-new-tokens", "4"]
        runs.start(name, "swarm", "generate", prompt, *flags, **options)

    def node(name: str, *flags: str, model: Path = folder / "tiny", peers: str = here) -> None:
        common = ["--model", str(model), "--initial-peers", peers, "--join-timeout", str(TIMEOUT_S)]
        runs.start(name, "node", "run", "--precision", "fp32", *common, *flags)

    generate("nobody serves the model", folder / "lonely")
    generate("nobody serves some blocks", folder / "gap")
    generate("all nodes are dead", folder / "doomed", timeout_s=8)
    generate("other weights under the name", folder / "others" / "tiny")
    generate("other weights of one block", folder / "changed" / "tiny")
    runs.start("no such folder", "swarm", "cache", "fetch", "/nowhere/at/all")
    generate("hub out of reach", "nobody/such-model", env=offline, real_command=True)
    runs.start("nonsense for a model", "swarm", "cache", "fetch", "what is this???")
    generate("prompt longer than the cache", folder / "tiny", "word " * 3000)
    generate("closed port", folder / "tiny", peers=at_closed_port)
    for name, address in {"silent port": at_silent_port, "wrong peer id": wrong_id}.items():
        runs.start(name, "swarm", "status", "--initial-peers", address, "--timeout", str(TIMEOUT_S))
    node("blocks out of range", "--blocks", "2:9")
    node("too many blocks", "--num-blocks", "9")
    node("too little memory", "--max-memory-mib", "1", "--cache-mib", "1")
    node("port in use", "--listen", here.partition("/p2p/")[0])
    node("identity in use", "--identity", str(folder / "bootstrap.identity"))
    node("identity corrupt", "--identity", str(folder / "bad.identity"))
    node("weights truncated", "--blocks", "0:2", model=folder / "truncated")
    node("config not json", "--blocks", "0:2", model=folder / "no_config")
    node("node at closed port", peers=at_closed_port)
    runs.start(
        "bootstrap port in use", "bootstrap", "--identity", str(folder / "b1"), "--listen", here.partition("/p2p/")[0]
    )
    runs.start("bootstrap identity in use", "bootstrap", "--identity", str(folder / "bootstrap.identity"))
    runs.start("bootstrap identity corrupt", "bootstrap", "--identity", str(folder / "bad.identity"))
    runs.start(
        "bootstrap closed port", "bootstrap", "--identity", str(folder / "b2"), "--initial-peers", at_closed_port
    )
    yield runs
    runs.close()


REFUSALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nobody serves the model": ("swarm", ("nobody serves lonely in this swarm (blocks 0:4", NO_ROUTE_NEXT)),
    "nobody serves some blocks": ("swarm", ("nobody serves blocks 2:4 of gap", NO_ROUTE_NEXT)),
    "all nodes are dead": (
        "swarm",
        ("nobody serves blocks 0:4 of doomed", "1 peer(s) that announce blocks failed just now", NO_ROUTE_NEXT),
    ),
    "other weights under the name": (
        "swarm",
        (
            "nobody serves tiny",
            "other weights under this name, from dir:",
            "tiny, while yours are from dir:",
            "/others/tiny",
        ),
    ),
    "other weights of one block": (
        "swarm",
        ("nobody serves blocks 0:4 of tiny", "with other weights, from dir:", "/changed/tiny", NO_ROUTE_NEXT),
    ),
    "no such folder": ("swarm", ("/nowhere/at/all does not exist: give a checkpoint folder",)),
    "hub out of reach": ("swarm", ("cannot reach the hub", "nobody/such-model", "check the network")),
    "nonsense for a model": ("swarm", ("no model 'what is this???': give a folder", "smollm2-135m")),
    "prompt longer than the cache": (
        "swarm",
        ("cache is too small", "1.0 MiB in all: at most 1632 tokens; use a shorter prompt or fewer new tokens"),
    ),
    "closed port": ("swarm", (f"none of the 1 initial peers answered within {TIMEOUT_S} s", "check the address")),
    "silent port": ("swarm", (f"none of the 1 initial peers answered within {TIMEOUT_S} s", "check the address")),
    "wrong peer id": ("swarm", (f"none of the 1 initial peers answered within {TIMEOUT_S} s", "check the address")),
    "blocks out of range": ("swarm-node", ("blocks 2:9 do not exist: tiny has 4 blocks (0:4)",)),
    "too many blocks": ("swarm-node", ("--num-blocks 9: tiny has 4 blocks",)),
    "too little memory": ("swarm-node", ("not one block of tiny", "raise --max-memory-mib or lower --cache-mib")),
    "port in use": ("swarm-node", ("cannot listen on /ip4/127.0.0.1/tcp/", "in use; choose another --listen")),
    "identity in use": ("swarm-node", ("is in use by another process; give each its own --identity",)),
    "identity corrupt": ("swarm-node", ("bad.identity is not an Ed25519 identity file; move it away",)),
    "weights truncated": ("swarm-node", ("truncated", "download")),
    "config not json": ("swarm-node", ("config.json",)),
    "node at closed port": ("swarm-node", (f"none of the 1 initial peers answered within {TIMEOUT_S} s",)),
    "bootstrap port in use": (
        "swarm-bootstrap",
        ("cannot listen on /ip4/127.0.0.1/tcp/", "in use; choose another --listen"),
    ),
    "bootstrap identity in use": ("swarm-bootstrap", ("is in use by another process; give each its own --identity",)),
    "bootstrap identity corrupt": ("swarm-bootstrap", ("bad.identity is not an Ed25519 identity file",)),
    "bootstrap closed port": ("swarm-bootstrap", ("none of the 1 initial peers answered within 15 s",)),
}
# Beside starting up and its own deadline: how long the request waits at most.
WAITS_S = {
    "all nodes are dead": 8.0,
    "hub out of reach": 8.0,
    "bootstrap closed port": 15.0,
    "port in use": 6.0,
    "bootstrap port in use": 6.0,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_input_ends_in_time_with_one_line_that_names_cause_and_next_step(runs: ProgramRuns, name: str) -> None:
    program, fragments = REFUSALS[name]
    lines = [line for line in runs[name].err.splitlines() if not _is_log_line(line)]
    done = runs[name]
    print(f"{name}: {done.seconds:.1f} s: {done.err.strip()}")
    assert "Traceback" not in done.err
    assert len(lines) == 1, done.err
    clean = type(done)(done.code, done.out, lines[0], done.seconds)
    clean.assert_refused(program, *fragments, within_s=START_S + WAITS_S.get(name, TIMEOUT_S))


def _is_log_line(line: str) -> bool:
    """Nodes and bootstrap peers log what they do; clients are silent."""
    return " I node." in line or " I swarm." in line or " W swarm.client." in line


def test_a_full_node_says_so_within_the_patience_of_the_client(
    swarm: LocalSwarm, folder: Path, nodes: dict[str, Process], runs: ProgramRuns
) -> None:
    node = nodes["full"]

    async def use_up() -> None:
        config = api.ClientConfig(
            model=str(folder / "full"), initial_peers=(node.address,), request_timeout_s=5, patience_s=1
        )
        span = Span(0, 4)
        async with (
            open_swarm(config) as client,
            client.session(max_length=8),
        ):
            with pytest.raises(api.Busy, match="one peer may have 1 sessions here; close some"):
                async with asyncio.timeout(5), client.session(max_length=8):
                    pass
            async with node_probe(node, folder / "full", span) as probe, probe.session():
                flags = ["--model", str(folder / "full"), "--initial-peers", swarm.bootstrap.address, "--timeout", "3"]
                runs.start("full", "swarm", "generate", "hello", *flags)
                done = await asyncio.to_thread(lambda: runs["full"])
        done.assert_refused(
            "swarm", "2 sessions are open, no more are served; try another node or later", within_s=START_S + 3
        )

    asyncio.run(use_up())


def test_more_tokens_than_a_session_was_opened_for_are_refused_at_once(
    swarm: LocalSwarm, folder: Path, nodes: dict[str, Process]
) -> None:
    with api.connect(initial_peers=swarm.initial_peers, model=str(folder / "tiny")) as connected:
        model, tokenizer = connected.model(), connected.tokenizer()
        prompt = tokenizer("a prompt of some length", return_tensors="pt")
        with model.session(max_length=4):
            with pytest.raises(
                api.SessionFull, match=r"holds 4 tokens, 0 are used .* open a session with a larger max_length"
            ):
                model.generate(**prompt, max_new_tokens=4)
        with contextlib.closing(connected):
            assert model.generate(**prompt, max_new_tokens=2).shape[1] == prompt["input_ids"].shape[1] + 2
