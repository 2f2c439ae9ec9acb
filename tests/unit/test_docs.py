"""What the documents say is true of the code: named functions, command lines, snippets, links."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

import swarm
from bootstrap.cli import bootstrap
from node.cli import cli as node_cli
from swarm.cli import cli as swarm_cli
from swarm.run_file import read_run_file

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PEER_ID = "12D3KooWJvyP3VJYymTqG7eH4PM5rN4T2agk5cdNCfNymAqwqcvZ"
PLACEHOLDERS = {"PEER_ID": PEER_ID, "RUN_ID": "ab" * 32, "OTHER_ID": "cd" * 32}
PROGRAMS = {"swarm": swarm_cli, "swarm-node": node_cli, "swarm-bootstrap": bootstrap}


def read(name):
    return (ROOT / name).read_text()


def blocks_of(text, *languages):
    """Contents of the fenced code blocks in these languages."""
    return [code for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if language in languages]


def command_lines(name):
    """Calls of our programs in the code blocks of a document, as lists of words."""
    code = "\n".join(blocks_of(read(name), "bash", "sh", "ini")).replace("\\\n", " ")
    calls = [shlex.split(line.removeprefix("ExecStart="), comments=True) for line in code.splitlines()]
    return [[Path(call[0]).name, *call[1:]] for call in calls if call and Path(call[0]).name in PROGRAMS]


def defined_names(path):
    """Functions, classes and methods ("Class.method") of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            names.add(node.name)
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, kinds)}
    return names


def parse(command, name, arguments):
    """Parse a command line, values included, without running it."""
    context = click.Context(command, info_name=name)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    settings = {"parent": context} if context.command is not command else {}
    command.make_context(name, list(arguments), **settings)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_functions_exist(document):
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", document.read_text())
    assert named or document.name != "architecture.md"
    missing = [
        f"{path}:{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in defined_names(ROOT / path)
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    if document.name == "CHANGELOG.md":
        return
    named = re.findall(r"`((?:swarm|node|bootstrap|protos|tests|scripts|benchmarks|examples|docs)/[\w./]*)`", document.read_text())  # fmt: skip
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    relative = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in relative if not (document.parent / target).exists()] == []


@pytest.fixture
def owners_folder(tmp_path, monkeypatch):
    """The current folder holds the files that the examples of a training run name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    (tmp_path / "run.toml").touch()
    return tmp_path


def test_the_example_of_a_run_file_is_accepted(owners_folder):
    (example,) = blocks_of(read("README.md"), "toml")
    (owners_folder / "run.toml").write_text(example)
    spec = read_run_file(owners_folder / "run.toml").spec
    assert (spec.name, len(spec.stages), spec.num_epochs, spec.data.files) == ("tiny stories", 2, 2000, ("a.jsonl",))


@pytest.mark.parametrize("document", ["README.md", "docs/operating.md"])
@pytest.mark.usefixtures("owners_folder")
def test_command_lines_parse(document, monkeypatch):
    monkeypatch.setenv("SHARDSWARM_INITIAL_PEERS", f"/ip4/203.0.113.7/tcp/31337/p2p/{PEER_ID}")
    lines = command_lines(document)
    assert lines
    monkeypatch.setattr("swarm.flags.Path.read_text", lambda _: 'model = "smollm2-135m"')  # of --config
    for program, *arguments in lines:
        filled = [
            functools.reduce(lambda text, item: text.replace(*item), PLACEHOLDERS.items(), word) for word in arguments
        ]
        parse(PROGRAMS[program], program, filled)


def test_the_readme_shows_every_command():
    shown = {" ".join(line[: 1 + (line[0] != "swarm-bootstrap")]) for line in command_lines("README.md")}
    assert shown >= {f"swarm {name}" for name in swarm_cli.commands} | {"swarm-node run", "swarm-bootstrap"}


def test_the_example_of_a_config_file_is_accepted(tmp_path, monkeypatch):
    (example,) = blocks_of(read("docs/operating.md"), "toml")
    monkeypatch.delenv("SHARDSWARM_INITIAL_PEERS", raising=False)
    path = tmp_path / "node.toml"
    path.write_text(example.replace("PEER_ID", PEER_ID))
    run = node_cli.commands["run"]
    context = run.make_context("run", ["--config", str(path)])
    given = tomllib.loads(path.read_text())
    assert context.params["num_blocks"] == given["num_blocks"] and len(context.params["initial_peers"]) == 1


def test_environment_names_are_as_documented(monkeypatch):
    monkeypatch.setenv("SHARDSWARM_NODE_CACHE_MIB", "77")
    run = node_cli.commands["run"]
    context = run.make_context("run", ["--model", "any"])
    assert context.params["cache_mib"] == 77
    document = read("docs/operating.md")
    keys = {parameter.name: max(parameter.opts, key=len) for parameter in run.params if parameter.expose_value}
    unlike = {key: flag for key, flag in keys.items() if key != flag.lstrip("-").replace("-", "_")}
    assert [flag for flag in unlike.values() if f"`{flag}`" not in document] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_snippets_compile_and_use_names_that_exist(document):
    for code in blocks_of(document.read_text(), "python"):
        tree = ast.parse(code)
        compile(tree, document.name, "exec")
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "swarm"
        }
        used |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "swarm"
            for alias in node.names
        }
        assert used <= set(swarm.__all__)


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted(ROOT.glob("examples/*.py"))], ids=lambda path: path.name)
def test_a_document_is_not_empty_and_ends_with_a_newline(path):
    text = path.read_text()
    assert text.strip() and text.endswith("\n")
