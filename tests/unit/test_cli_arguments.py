"""Command lines: help and argument errors are instant and load nothing heavy; a flag beats the environment, a file, the default."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import node.runtime
from bootstrap.cli import bootstrap
from node.cli import cli as node_cli
from node.config import NodeConfig
from swarm.cli import cli as swarm_cli
from swarm.errors import UserError
from swarm.flags import MultiaddrType
from swarm.identity import Identity
from swarm.span import Span
from tests.support.probes import Finished, run_program
from tests.support.processes import ROOT

PEER = f"/ip4/127.0.0.1/tcp/31337/p2p/{Identity.generate().peer_id}"
NODE = ["run", "--model", "tiny"]
GENERATE = ["generate", "hi", "--initial-peers", PEER]
HEAVY = {"torch", "transformers", "hivemind", "numpy", "huggingface_hub", "uvloop", "rich"}
AT_ONCE_S = 0.5


def timed_run(module: str, *arguments: str) -> tuple[Finished, float]:
    """The run, and the seconds of CPU that it took: on a quiet machine the time that a user waits, on a busy one not that of others."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_program(module, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return run, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("module", "arguments"), [("swarm", []), ("node", ["run"]), ("bootstrap", [])])
def test_help_is_there_at_once(module: str, arguments: list[str]) -> None:
    runs = [timed_run(module, *arguments, "--help") for _ in range(5)]
    assert all(run.code == 0 and run.out.startswith("Usage: ") and run.err == "" for run, _ in runs)
    median_s = statistics.median(cpu_s for _, cpu_s in runs)
    print(f"{module} --help: {median_s:.2f} s")
    assert median_s <= AT_ONCE_S


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("swarm", ["--help"]),
        ("swarm", ["generate", "--nonsense"]),
        ("swarm", ["run", "create", "--help"]),
        ("swarm", ["run", "show", "tiny"]),
        ("node", ["run", "--help"]),
        ("node", [*NODE, "--blocks", "3"]),
        ("bootstrap", ["--help"]),
        ("bootstrap", ["--listen", "nowhere"]),
    ],
)
def test_help_and_argument_errors_load_nothing_heavy(module: str, arguments: list[str]) -> None:
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['{module}', *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit:\n"
        f"    print('LOADED', sorted({sorted(HEAVY)!r} & sys.modules.keys()))\n".replace(
            f"{sorted(HEAVY)!r} &", f"set({sorted(HEAVY)!r}) &"
        )
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []", done


BAD_ARGUMENTS: dict[str, tuple[str, list[str], str]] = {
    "no command": ("swarm", ["sing"], "No such command 'sing'"),
    "no initial peers": ("swarm", ["generate", "hi"], "Missing option '--initial-peers'"),
    "empty prompt": ("swarm", ["generate", "", "--initial-peers", PEER], "the prompt is empty"),
    "no tokens wanted": ("swarm", [*GENERATE, "--max-new-tokens", "0"], "0 is not in the range x>=1"),
    "cold": ("swarm", [*GENERATE, "--temperature", "-1"], "-1.0 is not in the range x>=0.0"),
    "no time": ("swarm", [*GENERATE, "--timeout", "0"], "0.0 is not in the range x>=0.1"),
    "peer without id": ("swarm", ["status", "--initial-peers", "/ip4/127.0.0.1/tcp/1"], "is not a multiaddr such as"),
    "peer that is no address": (
        "swarm",
        ["status", "--initial-peers", "localhost:31337"],
        "is not a multiaddr such as",
    ),
    "port too high": ("swarm", ["status", "--initial-peers", PEER.replace("31337", "99999")], "is not a multiaddr"),
    "address too high": ("swarm", ["status", "--initial-peers", PEER.replace("127.0", "300.0")], "is not a multiaddr"),
    "run id": ("swarm", ["run", "show", "tiny"], "'tiny' is not a run id: give the 64 hexadecimal digits"),
    "no run file": (
        "swarm",
        ["run", "create", "/nowhere.toml", "--initial-peers", PEER],
        "'/nowhere.toml' does not exist",
    ),
    "run without a swarm": ("swarm", ["run", "publish", "ab" * 32], "Missing option '--initial-peers'"),
    "no model and no run": ("node", ["run"], "either --model, or --run for a stage of a training run"),
    "model and run": ("node", [*NODE, "--run", "ab" * 32], "either --model, or --run"),
    "a run twice": ("node", ["run", "--run", "ab" * 32, "--run", "ab" * 32], "--run names a run twice"),
    "status of both": (
        "swarm",
        ["status", "--model", "a", "--run", "ab" * 32, "--initial-peers", PEER],
        "--model and --run ask for different things",
    ),
    "blocks reversed": ("node", [*NODE, "--blocks", "5:2"], "need 0 <= start < end, got 5:2"),
    "blocks empty": ("node", [*NODE, "--blocks", "2:2"], "need 0 <= start < end, got 2:2"),
    "blocks nonsense": ("node", [*NODE, "--blocks", "first"], "expected blocks as start:end, for example 0:10"),
    "blocks contradict": ("node", [*NODE, "--blocks", "0:2", "--num-blocks", "3"], "contradict each other; give one"),
    "precision": (
        "node",
        [*NODE, "--precision", "fp64"],
        "'fp64' is not one of 'fp32', 'bf16', 'int8', 'int4', 'auto'",
    ),
    "device": ("node", [*NODE, "--device", "tpu"], "--device must be cpu, cuda or cuda:NUMBER, got 'tpu'"),
    "less than no change": (
        "node",
        [*NODE, "--max-perplexity-change", "-1"],
        "--max-perplexity-change must be 0 percent or more, got -1.0",
    ),
    "no cache": ("node", [*NODE, "--cache-mib", "0"], "--cache-mib must be positive, got 0"),
    "no threads": ("node", [*NODE, "--threads", "0"], "--threads must be positive, got 0"),
    "no blocks": ("node", [*NODE, "--num-blocks", "-1"], "--num-blocks must be positive, got -1"),
    "nothing for sessions": ("node", [*NODE, "--serving-share", "0"], "--serving-share must be more than 0 and less"),
    "nothing for training": ("node", [*NODE, "--serving-share", "1"], "must be more than 0 and less than 1, got 1.0"),
    "nothing for newcomers": (
        "node",
        ["run", "--run", "ab" * 32, "--donor-mib", "0.5"],
        "--donor-mib must be 1 or more",
    ),
    "short life": ("node", [*NODE, "--record-lifetime", "1"], "--record-lifetime must be 3 to 300 seconds"),
    "listen": ("node", [*NODE, "--listen", "0.0.0.0:80"], "is not a multiaddr such as /ip4/203.0.113.7/tcp/31337"),
    "listen port": ("node", [*NODE, "--listen", "/ip4/0.0.0.0/tcp/70000"], "is not a multiaddr"),
    "no such config": ("node", [*NODE, "--config", "/nowhere.toml"], "cannot read /nowhere.toml: "),
    "config is a folder": ("node", [*NODE, "--config", "/"], "cannot read /: "),
    "no identity": ("bootstrap", [], "Missing option '--identity'"),
    "bootstrap listen": ("bootstrap", ["--identity", "x", "--listen", "nowhere"], "is not a multiaddr"),
    "bootstrap peers": ("bootstrap", ["--identity", "x", "--initial-peers", "nowhere"], "is not a multiaddr"),
    "bootstrap config": ("bootstrap", ["--config", "/nowhere.toml"], "cannot read /nowhere.toml: "),
}
_COMMANDS: dict[str, click.Command] = {"swarm": swarm_cli, "node": node_cli, "bootstrap": bootstrap}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(name: str) -> None:
    program, arguments, sentence = BAD_ARGUMENTS[name]
    result = CliRunner().invoke(_COMMANDS[program], arguments, prog_name=program)
    Finished(result.exit_code, result.stdout, result.stderr, 0.0).assert_usage_error(sentence)


@pytest.mark.parametrize("name", ["peer that is no address", "blocks reversed", "bootstrap listen"])
def test_a_bad_argument_is_named_at_once(name: str) -> None:
    program, arguments, sentence = BAD_ARGUMENTS[name]
    runs = [timed_run(program, *arguments) for _ in range(3)]
    median_s = statistics.median(cpu_s for _, cpu_s in runs)
    print(f"{name}: {median_s:.2f} s")
    for run, _ in runs:
        run.assert_usage_error(sentence, within_s=10)
    assert median_s <= AT_ONCE_S


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NodeConfig]:
    """The configurations with which nodes would have been started."""
    configs: list[NodeConfig] = []
    monkeypatch.setattr(node.runtime, "run_node", lambda config: configs.append(config) or 0)
    for name in list(os.environ):
        if name.startswith("SHARDSWARM_"):
            monkeypatch.delenv(name)
    return configs


def run_node_cli(*arguments: str) -> Any:
    return CliRunner().invoke(node_cli, ["run", *arguments], prog_name="swarm-node")


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    started: list[NodeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        'model = "from-file"\nblocks = "0:3"\ncache-mib = 7\nmax_sessions = 7\nsession-idle = 7\n'
        + f'initial-peers = ["{PEER}"]\n'
    )
    monkeypatch.setenv("SHARDSWARM_NODE_CACHE_MIB", "8")
    monkeypatch.setenv("SHARDSWARM_NODE_MAX_SESSIONS", "8")
    result = run_node_cli("--config", str(file), "--max-sessions", "9")
    assert result.exit_code == 0, result.output
    (config,) = started
    assert config.max_sessions == 9  # flag, environment, file
    assert config.cache_bytes == 8 * 2**20  # environment, file
    assert (config.model, config.blocks, config.session_idle_s) == ("from-file", Span(0, 3), 7)  # file
    assert config.initial_peers == (PEER,)
    assert config.max_sessions_per_peer == NodeConfig(model="x").max_sessions_per_peer  # default


@pytest.mark.parametrize(
    ("flags", "variable", "serves"),
    [([], None, True), (["--no-sessions"], None, False), ([], "false", False), (["--sessions"], "false", True)],
)
def test_a_node_that_trains_serves_sessions_unless_it_is_told_not_to(
    started: list[NodeConfig], monkeypatch: pytest.MonkeyPatch, flags: list[str], variable: str | None, serves: bool
) -> None:
    if variable is not None:
        monkeypatch.setenv("SHARDSWARM_NODE_SESSIONS", variable)
    assert run_node_cli("--run", "ab" * 32, *flags).exit_code == 0
    assert started[0].serves_sessions is serves


def test_the_initial_peers_may_come_from_one_variable_for_all_programs(
    started: list[NodeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSWARM_INITIAL_PEERS", PEER)
    assert run_node_cli("--model", "tiny").exit_code == 0
    assert started[0].initial_peers == (PEER,)


def test_initial_peers_may_be_several_flags_or_one_with_commas(started: list[NodeConfig]) -> None:
    assert run_node_cli("--model", "t", "--initial-peers", f"{PEER},{PEER}", "--initial-peers", PEER).exit_code == 0
    assert started[0].initial_peers == (PEER,) * 3


@pytest.mark.parametrize(
    "given", [f'run = "{"ab" * 32}"', f'run = ["{"ab" * 32}", "{"cd" * 32}"]', "--run", f"{'ab' * 32} {'cd' * 32}"]
)
def test_a_node_may_host_one_run_or_several(
    started: list[NodeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    flags = []
    if given.startswith("run"):
        (tmp_path / "node.toml").write_text(given)
        flags = ["--config", str(tmp_path / "node.toml")]
    elif given == "--run":
        flags = ["--run", "ab" * 32, "--run", "cd" * 32]
    else:
        monkeypatch.setenv("SHARDSWARM_NODE_RUN", given)
    assert run_node_cli(*flags).exit_code == 0
    assert started[0].run_ids == (b"\xab" * 32, b"\xcd" * 32)[: 1 + ("cd" in given or given == "--run")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle = 'tiny'\n", "unknown key modle; known are"),
        ("model = \n", "cannot read"),
        ("max_sessions = 'many'\n", "'many' is not a valid integer"),
        ("max_sessions = -3\n", "--max-sessions must be positive, got -3"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(
    started: list[NodeConfig], tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    result = run_node_cli("--config", str(file), "--model", "tiny")
    Finished(result.exit_code, result.stdout, result.stderr, 0.0).assert_usage_error(sentence)
    assert not started


def test_a_config_file_of_bytes_is_refused(started: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(b"\xff\xfe\x00")
    result = run_node_cli("--config", str(file), "--model", "tiny")
    Finished(result.exit_code, result.stdout, result.stderr, 0.0).assert_usage_error("cannot read")


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("/ip4/127.0.0.1/tcp/0", True),
        ("/ip6/::1/tcp/31337", True),
        ("/dns4/swarm.example.org/tcp/443", True),
        ("/ip4/127.0.0.1/udp/4001/quic", True),
        ("/ip4/127.0.0.1/tcp/65536", False),
        ("/ip4/::1/tcp/1", False),
        ("/ip6/127.0.0.1/tcp/1", False),
        ("/ip4/127.0.0/tcp/1", False),
        ("/ip4/127.0.0.1", False),
        ("/ip4/127.0.0.1/tcp/1 /x", False),
        ("", False),
    ],
)
def test_only_multiaddrs_are_multiaddrs(text: str, fits: bool) -> None:
    kind = MultiaddrType(peer=False)
    if fits:
        assert kind.convert(text, None, None) == text
    else:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_a_configuration_made_in_code_is_checked_as_well() -> None:
    with pytest.raises(UserError, match="--precision must be one of fp32, bf16, int8, int4, auto, got 'fp64'"):
        NodeConfig(model="tiny", precision="fp64")
