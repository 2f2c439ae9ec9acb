"""Part "span": decode, prefill and training of blocks of a 1.1B LLaMA in this process, as shares of what the machine can do.

Decode of one token reads each weight once, so its floor is the weights' bytes over the rate at which memory is read. Prefill and
training are held against the time that torch's bf16 products of the same shapes take alone: all else (attention, norms, casts, the
optimizer) counts as loss. A round measures the yardsticks and everything that they judge, with the same threads; shares are of one round.
Memory's rate is the best of several reads; on a busy machine compare it with the fastest step, not with the median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.engine_models import LlamaShape, random_llama
from benchmarks.engine_session import EngineSession
from benchmarks.engine_yardsticks import GemmRate, ReadRate, seconds
from benchmarks.report import spread
from node.backend.span_model import SpanModel
from node.shard import load_shard
from node.training.stage import TrainableStage
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.run_spec import DataKind, DataSpec, Precision, RunSpec
from swarm.span import Span
from swarm.training.parameters import GradientSum, are_finite

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5625}
"""int4: 4 bits and 16 more for every 32 weights, as llama.cpp's Q4_0 has; a node that keeps more per group is held against the same."""
_NUM_PAST = 64
_STEPS_BETWEEN_READS = 5


def measure_span(options: argparse.Namespace) -> dict[str, Any]:
    """Results of the part. options: see benchmarks/engine.py."""
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(str(random_llama(options.cache, options.shape)))
    values = _Values()
    _measure_inference(checkpoint, options, values)
    _measure_training(checkpoint, options, values)
    return {key: spread(found) for key, found in values.items()}


class _Values(defaultdict[str, list[float]]):
    def __init__(self) -> None:
        super().__init__(list)

    def add(self, **figures: float) -> None:
        for key, value in figures.items():
            self[key.replace("__", ".")].append(value)


def _measure_inference(checkpoint: Checkpoint, options: argparse.Namespace, values: _Values) -> None:
    shape: LlamaShape = options.shape
    span = Span(0, shape.blocks)
    models = {name: load_shard(checkpoint, span, precision=name, device="cpu").model for name in options.precisions}
    sessions = {name: EngineSession(model) for name, model in models.items()}
    read, gemm = ReadRate(), GemmRate(shape, options.prefill_tokens, trains=False)
    for name, session in sessions.items():  # warm-up
        _prefill_s(models[name], session, options.prefill_tokens)
    gemm.block_s()
    for _ in range(options.repeats):
        for name, session in sessions.items():
            model = models[name]
            steps_s, rate = _decode(model, session, options.decode_steps, read)
            decode_s = statistics.median(steps_s) / shape.blocks
            floor_s = shape.weights_per_block * BYTES_PER_WEIGHT[name] / rate
            gemm_s = gemm.block_s()
            prefill_s = _prefill_s(model, session, options.prefill_tokens) / shape.blocks
            gemm_s = statistics.mean([gemm_s, gemm.block_s()])
            values.add(read_gb_per_s=rate / 1e9, gemm_gflop_per_s=gemm.flop_per_block / gemm_s / 1e9)
            values.add(
                **{
                    f"{name}__decode_ms_per_block": 1000 * decode_s,
                    f"{name}__floor_ms_per_block": 1000 * floor_s,
                    f"{name}__decode_share_of_floor": floor_s / decode_s,
                    f"{name}__fastest_step_share_of_floor": floor_s * shape.blocks / min(steps_s),
                    f"{name}__prefill_tokens_per_s_per_block": options.prefill_tokens / prefill_s,
                    f"{name}__prefill_share_of_gemm": gemm_s / prefill_s,
                }
            )


def _decode(model: SpanModel, session: EngineSession, num_steps: int, read: ReadRate) -> tuple[list[float], float]:
    """Seconds of each step of one token through the whole span, and bytes/s of the best read between them."""
    session.restart()
    session.step(_hidden(1, _NUM_PAST, model.hidden_size, model.dtype))
    token = _hidden(1, 1, model.hidden_size, model.dtype)
    steps_s, rates = [], []
    for number in range(num_steps):
        if number % _STEPS_BETWEEN_READS == 0:  # what others leave of the machine changes within a second
            rates.append(read.bytes_per_s())
            session.step(token)
        steps_s.append(seconds(lambda: session.step(token)))
    return steps_s, max(rates)


def _prefill_s(model: SpanModel, session: EngineSession, num_tokens: int) -> float:
    hidden = _hidden(1, num_tokens, model.hidden_size, model.dtype)
    session.restart()
    return seconds(lambda: session.step(hidden))


def _hidden(rows: int, tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, tokens, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _measure_training(checkpoint: Checkpoint, options: argparse.Namespace, values: _Values) -> None:
    """A microbatch forward and backward and the optimizer's step, as a node of a run does them: bf16 autocast over float32 weights."""
    rows, tokens = options.training_rows, options.training_tokens
    num_blocks = min(options.training_blocks, checkpoint.num_blocks)
    stage = TrainableStage(checkpoint, _rules(checkpoint, num_blocks, rows, tokens), 0)
    total = GradientSum(stage.parameters)
    gemm = GemmRate(options.shape, rows * tokens, trains=True)
    gemm.block_s()
    for number in range(-1, options.repeats):
        before_s = gemm.block_s()
        parts = _train(stage, total, rows, tokens)
        gemm_s = statistics.mean([before_s, gemm.block_s()])
        if number < 0:
            continue  # warm-up
        whole_s = sum(parts.values())
        values.add(
            training__gemm_gflop_per_s=gemm.flop_per_block / gemm_s / 1e9,
            training__tokens_per_s_per_block=rows * tokens * num_blocks / whole_s,
            training__share_of_gemm=gemm_s * num_blocks / whole_s,
            **{f"training__{part}_ms_per_block": 1000 * part_s / num_blocks for part, part_s in parts.items()},
        )


def _train(stage: TrainableStage, total: GradientSum, rows: int, tokens: int) -> dict[str, float]:
    """Seconds of each part of one step."""
    hidden = _hidden(rows, tokens, stage.hidden_size, torch.float32)
    made: dict[str, Any] = {}

    def forward() -> None:
        made["entry"] = stage.differentiable(hidden, range(rows))

    def backward() -> None:
        _, of_weights = stage.backward(made.pop("entry"), hidden)
        assert are_finite(of_weights)
        total.add(of_weights)

    def step() -> None:
        stage.parameters.step(total.vector.mul_(1 / rows), lr=1e-6)
        total.clear()

    return {part.__name__: seconds(part) for part in (forward, backward, step)}


def _rules(checkpoint: Checkpoint, num_blocks: int, rows: int, tokens: int) -> RunSpec:
    """A run whose first stage is to be trained here."""
    edges = sorted({0, num_blocks, checkpoint.num_blocks})
    return RunSpec(
        name="engine",
        config=AutoConfig.from_pretrained(checkpoint.folder).to_dict(),
        stages=tuple(Span(start, end) for start, end in itertools.pairwise(edges)),
        sequence_length=tokens,
        target_batch=rows,
        microbatch=rows,
        precision=Precision.BF16,
        data=DataSpec(kind=DataKind.OWN),
        num_epochs=1,
    )
