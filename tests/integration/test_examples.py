"""The examples do what they say against a small real swarm, and stay short enough to be read at once."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.support.fork_server import ROOT
from tests.support.probes import run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 79
# Imports of torch, transformers and hivemind on a busy machine take most of this.
TIMEOUT_S = 60


def run_example(fork_server, name, *arguments, typed=""):
    """fork_server: None for an interpreter of its own."""
    path = str(ROOT / "examples" / name)
    return run_python(path, *arguments, typed=typed, timeout_s=TIMEOUT_S, fork_server=fork_server)


@pytest.fixture(scope="module")
def where(tiny_swarm, tiny_path):
    return ["--initial-peers", *tiny_swarm.initial_peers, "--model", str(tiny_path)]


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} >= {"generate.py", "chat.py", "finetune_prompt.py", "classify.py"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_a_screen_or_two(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_generate_streams_a_continuation_and_names_its_route(where):
    done = run_example(None, "generate.py", "The quick", *where, "--max-new-tokens", "5")
    assert done.code == 0, done.err
    assert done.out.startswith("The quick")
    summary = done.out.splitlines()[-1]
    assert "tokens in" in summary and "0:1 at" in summary and "3:4 at" in summary and "hops replaced: 0" in summary


def test_chat_answers_every_line_and_keeps_its_caches(where, fork_server):
    done = run_example(
        fork_server, "chat.py", *where, "--max-length", "200", "--max-new-tokens", "4", typed="Hello\nAnd now?\n"
    )
    assert done.code == 0, done.err
    held = [int(line.split()[3]) for line in done.err.splitlines() if line.startswith("[the nodes hold")]
    assert len(held) == 2 and 0 < held[0] < held[1]


def last_numbers(lines):
    """The number at the end of each line."""
    return [float(line.split()[-1].rstrip("%")) for line in lines]


def test_finetune_prompt_lowers_the_loss_and_loads_what_it_saved(where, fork_server, tmp_path):
    output = tmp_path / "prompt"
    done = run_example(
        fork_server,
        "finetune_prompt.py",
        *where,
        "--steps",
        "10",
        "--batch-size",
        "4",
        "--max-tokens",
        "24",
        "--output",
        str(output),
    )
    assert done.code == 0 and done.err == "", done.err
    lines = done.out.splitlines()
    assert [line.split(": loss")[0] for line in lines if ": loss" in line] == ["  step 5", "  step 10"]
    _, before, after, again = last_numbers(line for line in lines if ": loss" not in line)
    assert before > after == again
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_classify_trains_a_head_and_saves_it(where, fork_server, tmp_path):
    output = tmp_path / "head"
    done = run_example(
        fork_server, "classify.py", *where, "--steps", "200", "--max-tokens", "24", "--output", str(output)
    )
    assert done.code == 0 and done.err == "", done.err
    # How well a random model can do it depends on which licences there are; that a head learns is test_finetuning.py's.
    before, after = last_numbers(done.out.splitlines()[:2])
    assert 0 <= before <= 100 and 0 <= after <= 100
    head = load_file(output / "model.safetensors")["score.weight"]
    assert head.shape == (2, 32) and head.std() > 0.03  # a new one has 0.02


def test_an_error_is_one_line_that_says_what_to_do(where, fork_server):
    done = run_example(fork_server, "chat.py", *where, "--max-length", "4", typed="a line that does not fit\n")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and "max_length" in line
