"""Pages of mapped files are given back and can still be read; all other memory is left alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from node.backend.mapped_pages import MappedPages
from swarm.tensor_files import read_tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is measured is in /proc")


def mapped_bytes(path: Path) -> int:
    """Of a file that this process has in memory."""
    found = 0
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(path) in entry:
            found += 1024 * sum(int(size) for size in re.findall(r"\nRss:\s+(\d+) kB", entry))
    return found


def test_what_was_read_of_a_file_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    wanted = {"a": torch.randn(500, 1000), "b": torch.randn(500, 1000).bfloat16(), "c": torch.randn(3)}
    save_file(wanted, path)
    tensors = read_tensors(path, list(wanted))
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert mapped_bytes(path) >= 3_000_000
    pages = MappedPages()
    assert all(pages.shows(tensors[name]) and not pages.shows(wanted[name]) for name in wanted)
    assert 990_000 < pages.drop([tensors["b"], tensors["c"]]) <= 1_000_000
    assert 1_900_000 < mapped_bytes(path) < 2_300_000
    assert 1_990_000 < pages.drop([tensors["a"]]) <= 2_000_000
    assert mapped_bytes(path) < 300_000
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_other_memory_is_left_alone(tmp_path: Path) -> None:
    own = torch.randn(1000, 1000)
    expected = own.clone()
    shared = own.clone().share_memory_()
    packed = torch.ops.mkldnn._reorder_linear_weight(own, None)
    pages = MappedPages()
    assert pages.drop([own, own.t(), packed, torch.empty(0), torch.empty(5, device="meta")]) == 0
    pages.drop([shared])
    assert torch.equal(own, expected) and torch.equal(shared, expected) and torch.equal(packed.to_dense(), expected)


def test_without_maps_nothing_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    tensors = read_tensors(path, ["a"])
    assert MappedPages(tmp_path / "no maps").drop(tensors.values()) == 0
