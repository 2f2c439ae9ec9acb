"""Serving: what belongs to a loaded shard so that peers can use it: the engine on the device, sessions, microbatches, and the service."""

from __future__ import annotations

from node.backend.step_engine import StepEngine
from node.config import NodeConfig
from node.executor import Executor
from node.kv_cache import PAGE_TOKENS, SessionTable, num_pages_of, session_limits_of
from node.microbatches import Microbatches, microbatch_limits_of
from node.service import NodeService
from node.shard import Shard
from node.step_queue import BatchLimits
from node.steps import Steps
from node.thread_tuner import ThreadTuner
from node.throughput import Throughput, thread_counts

MAX_STALL_S = 0.1
"""A prompt delays the steps of others by about so much at most: the rest of it waits for the next batch."""


def load_engine(shard: Shard, config: NodeConfig, *, num_models: int = 1) -> StepEngine:
    """On the device thread. num_models: which share the memory for caches."""
    limits = session_limits_of(config, num_models=num_models)
    num_pages = num_pages_of(limits, shard.cache_bytes_per_token)
    engine = StepEngine(shard.model, num_pages=num_pages, page_tokens=PAGE_TOKENS)
    engine.trace(shard.span)
    return engine


def serve_shard(
    shard: Shard,
    model_name: str,
    engine: StepEngine,
    executor: Executor,
    config: NodeConfig,
    throughput: Throughput,
    *,
    num_models: int = 1,
) -> NodeService:
    if config.threads is None:
        engine.tuner = ThreadTuner(thread_counts(None), throughput.threads)
    sessions = SessionTable(
        session_limits_of(config, num_models=num_models), shard.cache_bytes_per_token, shard.model.longest_text
    )
    microbatches = Microbatches(shard, executor, microbatch_limits_of(config, num_models=num_models))
    chunk_tokens = max(16, min(512, int(throughput.prefill_tokens_per_s * MAX_STALL_S)))
    steps = Steps(
        engine, executor, BatchLimits(chunk_tokens), config.max_waiting_jobs, expected_returns=sessions.expected_returns
    )
    return NodeService(shard, model_name, steps, sessions, microbatches)
