"""What `scripts/demo --train` is made of; the demo itself says by its exit code whether the loss fell."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from swarm.run_file import read_run_file
from swarm.tokenizer_files import load_tokenizer
from tests.support.processes import ROOT


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("demo_training")


def test_its_rules_are_accepted_and_its_tokenizer_knows_every_character(demo: Any, tmp_path: Path) -> None:
    num_characters = demo.write_files(tmp_path / "run")
    described = read_run_file(tmp_path / "run" / "run.toml")
    spec = described.spec
    assert [str(stage) for stage in spec.stages] == list(demo.STAGES) and spec.num_epochs == demo.NUM_EPOCHS
    assert (spec.num_epochs - 1) % spec.eval_every == 0, "the last epoch evaluates"
    tokenizer = load_tokenizer(described.tokenizer_folder)
    assert len(tokenizer) == demo.VOCAB_SIZE == spec.config["vocab_size"]
    training, held_out = demo.read_manual()
    assert num_characters == sum(map(len, training)) > 300_000
    assert len(held_out) == demo.NUM_HELD_OUT and not set(held_out) & set(training)
    text = held_out[0] + " \N{SNOWMAN}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_only_whole_lines_of_a_log_are_read_each_of_them_once(demo: Any, tmp_path: Path) -> None:
    lines = demo.follow(tmp_path / "log")
    assert next(lines) == []
    with (tmp_path / "log").open("a") as log:
        for text, complete in (("one\ntw", ["one"]), ("", []), ("o\nthree\n", ["two", "three"])):
            log.write(text)
            log.flush()
            assert next(lines) == complete
