"""How a node chooses its numeric class: by what it may cost, then by what was measured."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig

from node import precision
from node.precision import choose_class, class_of_run, classes_within, fastest, measure_classes
from swarm.numeric_class import NUMERIC_CLASSES
from swarm.run_spec import FrozenPrecision, LoraSettings, Precision
from tests.support.models import TINY
from tests.support.runs import make_spec

CONFIG = AutoConfig.for_model("llama", **TINY["llama"])


@pytest.mark.parametrize(
    ("percent", "classes"),
    [
        (0, ("fp32",)),
        (0.09, ("fp32",)),
        (0.1, ("fp32", "bf16")),
        (0.5, ("fp32", "bf16", "int8")),
        (100, ("fp32", "bf16", "int8", "int4")),
    ],
)
def test_a_budget_allows_classes_by_their_stated_change(percent: float, classes: tuple[str, ...]) -> None:
    assert classes_within(percent) == classes


def test_the_fastest_class_wins_and_of_equally_fast_ones_the_most_exact() -> None:
    assert fastest({"fp32": 3.0, "bf16": 2.0, "int8": 1.0}) == "int8"
    assert fastest({"fp32": 2.0, "bf16": 1.04, "int8": 1.0}) == "bf16"
    assert fastest({"bf16": 1.06, "int8": 1.0, "int4": 0.99}) == "int8"
    assert fastest({"int4": 5.0}) == "int4"


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure_classes", None)
    for name in NUMERIC_CLASSES:
        assert choose_class(name, 0, None, device="cpu", threads=1) == name
    assert choose_class("auto", 0.05, None, device="cpu", threads=1) == "fp32"


def test_auto_takes_what_a_block_of_this_model_is_fastest_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two classes are slowed down; the figures are in the log."""
    real = precision._step_s

    def slowed(model: precision.SpanModel) -> float:
        return real(model) + (1.0 if model.numeric_class in ("fp32", "int4") else 0.5 * (model.numeric_class == "bf16"))

    monkeypatch.setattr(precision, "_step_s", slowed)
    with caplog.at_level(logging.INFO, precision.log.name):
        assert choose_class("auto", 0.5, CONFIG, device="cpu", threads=1) == "int8"
        assert choose_class("auto", 0.1, CONFIG, device="cpu", threads=1) == "bf16"
        assert choose_class("auto", 50, CONFIG, device="cpu", threads=1) == "int8"
    assert "numeric class int8 of those within 0.5 %" in caplog.text and "fp32=10" in caplog.text


def test_measuring_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = measure_classes(CONFIG, ("fp32", "bf16"), threads=2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert measured.keys() == {"fp32", "bf16"} and all(0 < seconds < 1 for seconds in measured.values())


def test_a_run_is_served_in_what_its_rules_say_unless_the_node_says_otherwise() -> None:
    for rule in Precision:
        spec = make_spec(precision=rule)
        assert class_of_run("auto", spec) == rule.value
        assert class_of_run("int8", spec) == "int8"
        frozen = make_spec(precision=rule, lora=LoraSettings(frozen_precision=FrozenPrecision.INT4))
        assert class_of_run("auto", frozen) == "int4" and class_of_run("fp32", frozen) == "fp32"
