"""The engine's benchmark still runs, and judges what it measures; how fast anything is, no test says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.engine import GOALS, judge, main
from benchmarks.engine_profile import kind_of
from benchmarks.report import spread


def test_the_parts_without_processes_run(tmp_path, capsys):
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--part", "span", "--part", "profile", "--precisions", "bf16", "--threads", threads]
    main([*arguments, "--cache", str(tmp_path), "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["bf16.decode_share_of_floor"]["median"] > 0
    assert results["bf16.prefill_share_of_gemm"]["median"] > 0
    assert results["training.share_of_gemm"]["median"] > 0
    shares = [results[f"bf16.profile.share_of_{kind}"] for kind in ("linears", "attention", "rest")]
    assert sum(shares) == pytest.approx(1, abs=0.01)


def test_goals_are_judged_by_medians():
    ratio, overhead_ms = spread([0.5, 0.5, 0.46]), spread([0.9, 0.7, 1.0])
    assert judge({"bf16.ratio_to_llama_cpp_f16": ratio, "bf16.overhead_per_hop_ms": overhead_ms}) == {
        "goal.bf16.ratio_to_llama_cpp_f16": ">= 0.45: met",
        "goal.bf16.overhead_per_hop_ms": "<= 0.8: missed by the median, not by all that was measured",
    }
    assert judge(dict.fromkeys(GOALS, "not measured")) == {}


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "linears"),
        ("mkldnn::_linear_pointwise", "linears"),
        ("aten::_weight_int4pack_mm_for_cpu", "linears"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mul", "rest"),
    ],
)
def test_operators_are_told_apart_by_name(operator, kind):
    assert kind_of(operator) == kind
