"""swarm status, swarm cache and swarm generate, as a user and a script see them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.probes import ProgramRuns, run_program
from tests.support.processes import LocalSwarm, Process, local_swarm


@pytest.fixture(scope="module")
def swarm(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with local_swarm(tmp_path_factory.mktemp("cli"), fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(swarm: LocalSwarm) -> dict[str, Process]:
    """Two models on one DHT: alpha whole, in two spans; of beta only a part."""
    alpha = save_tiny("llama", swarm.folder / "alpha")
    beta = save_tiny("llama", swarm.folder / "beta", seed=1)
    nodes = {
        "alpha 0:3": swarm.start_node(alpha, "0:3"),
        "alpha 2:4": swarm.start_node(alpha, "2:4"),
        "beta 1:2": swarm.start_node(beta, "1:2"),
    }
    for node in nodes.values():
        node.ready()
    return nodes


@pytest.fixture(scope="module")
def runs(fork_server: ForkServer, swarm: LocalSwarm, nodes: dict[str, Process]) -> Iterator[ProgramRuns]:
    runs = ProgramRuns(fork_server, at_once=4)
    peers = ["--initial-peers", swarm.bootstrap.address]
    wide = {"COLUMNS": "250"}
    runs.start("status json", "swarm", "status", *peers, "--json")
    runs.start("status", "swarm", "status", *peers, env=wide)
    runs.start("status beta", "swarm", "status", *peers, "--model", "beta", env=wide)
    runs.start("status of nothing", "swarm", "status", *peers, "--model", "gamma")
    generate = ["generate", "hello", *peers, "--max-new-tokens", "5", "--model"]
    runs.start("alpha", "swarm", *generate, str(swarm.folder / "alpha"), "--json")
    runs.start("alpha streamed", "swarm", *generate, str(swarm.folder / "alpha"))
    runs.start("beta", "swarm", *generate, str(swarm.folder / "beta"), "--timeout", "4")
    yield runs
    runs.close()


def test_status_tells_a_script_who_serves_what_since_when(nodes: dict[str, Process], runs: ProgramRuns) -> None:
    done = runs["status json"]
    assert done.code == 0 and done.err == "", done
    models = {model["model"]: model for model in json.loads(done.out)["models"]}
    assert set(models) == {"alpha", "beta"}
    assert (models["alpha"]["num_blocks"], models["alpha"]["unserved_blocks"]) == (4, [])
    assert models["beta"]["unserved_blocks"] == ["0:1", "2:4"]
    assert models["alpha"]["digest"] != models["beta"]["digest"]
    served = {f"{name} {node['span']}": node for name, model in models.items() for node in model["nodes"]}
    assert {name: node["peer_id"] for name, node in served.items()} == {n: p.peer_id for n, p in nodes.items()}
    for name, node in served.items():
        assert node["state"] == "ONLINE" and node["numeric_class"] == "fp32"
        assert node["decode_ms_per_block"] > 0 and node["prefill_tokens_per_s"] > 0
        assert 0 < node["online_s"] < 300
        kind, _, place = node["source"].partition(":")
        assert kind == "dir" and Path(place).name == name.split()[0]
        assert node["addresses"] == [nodes[name].address.partition("/p2p/")[0]]


def test_status_tells_people_the_same(nodes: dict[str, Process], runs: ProgramRuns) -> None:
    done = runs["status"]
    assert done.code == 0 and done.err == "", done
    assert "4 blocks: all blocks served" in done.out
    assert "4 blocks: NOT served: blocks 0:1, 2:4" in done.out
    for name, node in nodes.items():
        row = next(line for line in done.out.splitlines() if node.peer_id[-8:] in line)
        assert name.split()[1] in row and "ONLINE" in row and " s " in row


def test_status_of_one_model_leaves_out_the_others(nodes: dict[str, Process], runs: ProgramRuns) -> None:
    done = runs["status beta"]
    assert nodes["beta 1:2"].peer_id[-8:] in done.out and nodes["alpha 0:3"].peer_id[-8:] not in done.out
    assert "No node serves anything" in runs["status of nothing"].out and runs["status of nothing"].code == 0


def test_two_models_on_one_dht_do_not_mix(nodes: dict[str, Process], runs: ProgramRuns) -> None:
    done = runs["alpha"]
    assert done.code == 0 and done.err == "", done
    answer = json.loads(done.out)
    assert (answer["model"], len(answer["token_ids"]), answer["num_reroutes"]) == ("alpha", 5, 0)
    peers = [nodes["alpha 0:3"].peer_id[-8:], nodes["alpha 2:4"].peer_id[-8:]]
    assert [hop.split(" at ")[1].split()[0] for hop in answer["route"]] == peers
    runs["beta"].assert_refused("swarm", "nobody serves blocks 0:1, 2:4 of beta", within_s=40)


def test_generate_streams_the_text_to_stdout_and_tells_route_and_speed_on_stderr(runs: ProgramRuns) -> None:
    done = runs["alpha streamed"]
    assert done.code == 0
    assert done.out.strip() == json.loads(runs["alpha"].out)["text"].strip()
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, "nothing but the summary"
    assert lines[0].startswith("[5 tokens, ") and "tokens/s, first after " in lines[0] and "; route 0:" in lines[0]


def test_a_node_that_leaves_is_shown_as_leaving_or_not_at_all(
    fork_server: ForkServer, swarm: LocalSwarm, nodes: dict[str, Process], runs: ProgramRuns
) -> None:
    assert runs["beta"].code == 1  # its run is over
    assert nodes["beta 1:2"].stop() == 0
    which = ("--initial-peers", swarm.bootstrap.address, "--model", "beta", "--json")
    done = run_program("swarm", "status", *which, fork_server=fork_server)
    states = [node["state"] for model in json.loads(done.out)["models"] for node in model["nodes"]]
    assert states in ([], ["LEAVING"])


# swarm cache ------------------------------------------------------------------------------------------------------------


def make_entry(root: Path, name: str, age_days: float = 0.0, size: int = 1000) -> Path:
    """A model in the cache, as a conversion leaves it."""
    folder = root / "models" / f"key-{name}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size))
    (folder / "entry.json").write_text(json.dumps({"name": name, "source": f"gguf:/{name}.gguf"}))
    lock = folder.with_suffix(".lock")
    lock.touch()
    used = time.time() - age_days * 86_400
    os.utime(lock, (used, used))
    return folder


def cache(root: Path, *arguments: str, fork_server: ForkServer | None = None) -> Any:
    """swarm cache ARGUMENTS, which starts quickly but for `fetch`."""
    return run_program("swarm", "cache", *arguments, "--cache-dir", str(root), fork_server=fork_server)


def test_the_cache_is_listed_the_last_used_first(tmp_path: Path) -> None:
    make_entry(tmp_path, "old", age_days=9)
    make_entry(tmp_path, "new", size=3 * 2**20)
    listed = cache(tmp_path, "list")
    assert listed.code == 0 and listed.out.splitlines()[0].startswith("new ") and "3.0 MiB" in listed.out
    rows = json.loads(cache(tmp_path, "list", "--json").out)
    assert [(row["name"], row["source"]) for row in rows] == [("new", "gguf:/new.gguf"), ("old", "gguf:/old.gguf")]
    assert rows[0]["bytes"] > 3 * 2**20 and rows[0]["path"] == str(tmp_path / "models" / "key-new")
    assert cache(tmp_path / "nowhere", "list").out == "nothing is kept\n"


def test_the_cache_is_pruned_by_age_by_name_and_whole(tmp_path: Path) -> None:
    folders = {name: make_entry(tmp_path, name, age) for name, age in {"old": 9, "named": 1, "rest": 1}.items()}
    assert cache(tmp_path, "prune", "--unused-days", "7").out == "removed 1 model(s), 0.0 MiB\n"
    assert not folders["old"].exists() and folders["named"].exists()
    assert cache(tmp_path, "prune", "named").code == 0
    assert not folders["named"].exists() and folders["rest"].exists()
    cache(tmp_path, "prune", "ghost").assert_refused("swarm", "'ghost' is not in the cache", "holds: rest", within_s=5)
    cache(tmp_path, "prune").assert_refused("swarm", "say what to remove", within_s=5)
    assert cache(tmp_path, "prune", "--all").code == 0 and not folders["rest"].exists()


def test_a_model_in_use_is_not_pruned(tmp_path: Path) -> None:
    from swarm.cache import find

    folder = make_entry(tmp_path, "used")
    found = find(tmp_path, "key-used")
    assert found is not None
    try:
        assert cache(tmp_path, "prune", "--all").out.startswith("removed 0 model(s)")
        assert folder.exists()
    finally:
        found[1].release()


def test_fetch_makes_a_model_ready_and_says_what_it_is(fork_server: ForkServer, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    done = cache(tmp_path / "cache", "fetch", str(folder), fork_server=fork_server)
    assert done.code == 0 and done.out == "", done
    assert done.err.startswith("tiny: 4 blocks, ") and done.err.endswith(f", from dir:{folder}\n"), done.err
    missing = cache(tmp_path / "cache", "fetch", str(tmp_path / "nothing"), fork_server=fork_server)
    missing.assert_refused("swarm", "does not exist: give a checkpoint folder", within_s=25)
