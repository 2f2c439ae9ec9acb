"""Tokenising in other processes. They are spawned, never forked, and end with this one, however it ends.

Start a pool before anything that must not be inherited, such as p2pd. A script that starts one needs the usual
`if __name__ == "__main__":`, as with everything that multiprocessing spawns.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from swarm.errors import UserError
from swarm.tokenizer_files import load_tokenizer
from swarm.training.data_document import Document
from swarm.training.tokenizing import Tokens, tokenize_documents

Load: TypeAlias = Callable[[], Sequence[Document]]

_CHECK_PARENT_S = 2.0
_END_S = 5.0


class Tokenizing(Protocol):
    """Whatever turns documents into tokens."""

    @property
    def num_workers(self) -> int: ...

    def submit(self, load: Load) -> Future[Tokens]:
        """Tokens of the documents that load returns. Errors of both are raised at once or come with the result."""
        ...


class TokenizingHere:
    """In this process, at once."""

    num_workers = 0

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def submit(self, load: Load) -> Future[Tokens]:
        future: Future[Tokens] = Future()
        future.set_result(tokenize_documents(self._tokenizer, load()))
        return future


@dataclass(frozen=True, slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection


class TokenizerPool:
    """Context manager: num_workers processes that tokenise; 0: this process does.

    A worker gets a copy of the tokenizer, and so needs neither its files nor torch (1 s to start and 0.1 GB; a worker that
    opened the folder with AutoTokenizer took 5 s and 0.4 GB). Documents are loaded in threads of this process, one for each.
    """

    def __init__(self, num_workers: int, tokenizer: Any) -> None:
        """tokenizer: a transformers tokenizer, or the folder of one."""
        if num_workers < 0:
            raise ValueError(f"need num_workers >= 0, got {num_workers}")
        self.num_workers = num_workers
        self._tokenizer = tokenizer
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._here: TokenizingHere | None = None
        self._is_closing = False

    def __enter__(self) -> TokenizerPool:
        """Raises UserError for a folder without a tokenizer."""
        tokenizer = load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, Path) else self._tokenizer
        if not self.num_workers:
            self._here = TokenizingHere(tokenizer)
            return self
        for _ in range(self.num_workers):
            worker = _start_worker(tokenizer)
            self._workers.append(worker)
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="tokenizer")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_END_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        if self._threads is not None:
            self._threads.shutdown()
        for worker in self._workers:
            worker.connection.close()

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def submit(self, load: Load) -> Future[Tokens]:
        """Tokens of the documents that load returns. Errors of both are raised at once or come with the result.

        A worker that was killed is an error of every job it would have done. CancelledError once the pool is closed.
        """
        if self._here is not None:
            return self._here.submit(load)
        if self._threads is None:
            raise RuntimeError("enter the pool before it is used")
        return self._threads.submit(self._run, load)

    def _run(self, load: Load) -> Tokens:
        documents = load()
        worker = self._idle.get()  # there are as many as threads
        try:
            worker.connection.send(documents)
            reply = worker.connection.recv()
        except (EOFError, OSError) as error:
            if self._is_closing:
                raise CancelledError from error
            raise UserError(
                "a tokenizing process was ended from outside, probably because memory ran out: "
                "start again with fewer tokenizing workers"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(reply, UserError):
            raise reply
        assert isinstance(reply, Tokens)
        return reply


def _start_worker(tokenizer: Any) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(theirs, tokenizer, os.getpid()), name="shardswarm tokenizer", daemon=True
    )
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, tokenizer: Any, parent_pid: int) -> None:
    """A worker's life: documents in, Tokens or a UserError out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        # End of file tells that the parent is gone, unless something else inherited its end of the pipe.
        while not connection.poll(_CHECK_PARENT_S):
            if os.getppid() != parent_pid:
                return
        try:
            documents = connection.recv()
            try:
                connection.send(tokenize_documents(tokenizer, documents))
            except UserError as error:
                connection.send(error)
        except (EOFError, OSError):
            return
