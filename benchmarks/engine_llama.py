"""llama.cpp in a process of another interpreter, a round at a time, so that it takes turns with the swarm."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("engine_llama_worker.py")
WAIT_POLICIES = ("", "PASSIVE")
_TRIAL_ROUNDS = 3
_TRIAL_TOKENS = 16


def fastest_llama(python: Path, gguf: Path, threads: int, prompt: Sequence[int]) -> LlamaProcess:
    """A LlamaProcess with the wait policy that is faster here, in a trial.

    Threads that spin are quicker on a machine of one's own, and up to 30 times slower where others compute, too.
    """
    tried = [LlamaProcess(python, gguf, threads, policy) for policy in WAIT_POLICIES]
    seconds: list[list[float]] = [[] for _ in tried]
    for _ in range(_TRIAL_ROUNDS):
        for process, times in zip(tried, seconds, strict=True):
            times.append(process.generate(prompt, _TRIAL_TOKENS).seconds)
    medians = [statistics.median(times) for times in seconds]
    chosen = tried[medians.index(min(medians))]
    for process in tried:
        if process is not chosen:
            process.close()
    return chosen


@dataclass(frozen=True, slots=True)
class LlamaRound:
    """One greedy generation. seconds: from the prompt to the last token."""

    seconds: float
    first_token_s: float
    tokens: list[int]


class LlamaProcess:
    """llama-cpp-python with one GGUF loaded. Use as a context manager."""

    def __init__(self, python: Path, gguf: Path, threads: int, wait_policy: str) -> None:
        """wait_policy: OpenMP's, of threads that wait for each other; "": the library's own."""
        self.wait_policy = wait_policy
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "PYTHON"))}
        if wait_policy:
            env["OMP_WAIT_POLICY"] = wait_policy
        self._process = subprocess.Popen(
            [str(python), str(WORKER), str(gguf), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        self.build: dict[str, str] = self._read_line()
        """"version" of llama-cpp-python, and "system": what its llama.cpp uses of this CPU."""

    def generate(self, tokens: Sequence[int], num_new: int) -> LlamaRound:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": list(tokens), "num_new": num_new}) + "\n")
        self._process.stdin.flush()
        return LlamaRound(**self._read_line())

    def _read_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"llama.cpp ended with exit code {self._process.wait()}: does --llama-python have llama_cpp?"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> LlamaProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
