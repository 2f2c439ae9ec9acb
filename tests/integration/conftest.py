"""Swarms that several tests share."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from tests.support.models import save_tiny
from tests.support.processes import local_swarm


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_swarm(tiny_path, fork_server, tmp_path_factory):
    """A tiny llama of 4 blocks on three nodes of unequal size."""
    with local_swarm(tmp_path_factory.mktemp("tiny-swarm"), fork_server=fork_server) as nodes:
        nodes.start_nodes(tiny_path, "0:1", "1:3", "3:4")
        yield nodes


@pytest.fixture(scope="session")
def tiny(tiny_path, tiny_swarm):
    """(the model through the swarm, the same model local, its tokenizer)"""
    with swarm.connect(initial_peers=tiny_swarm.initial_peers, model=str(tiny_path)) as connected:
        local = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
        yield connected.model(), local, AutoTokenizer.from_pretrained(tiny_path)
