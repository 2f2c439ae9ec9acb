"""A training run on this machine: two stages with two nodes each and two trainers learn English from Python's manual.

On the way a node is killed, and another one takes its place. Raises DemoError if that, or the learning, does not work.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_processes import Child, DemoError, DemoSwarm, how_ended, last_lines
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

STAGES = ("0:2", "2:4")
REPLICAS = ("a", "b")
NUM_TRAINERS = 2
VOCAB_SIZE = 1024
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
NUM_EPOCHS = 201
EVAL_EVERY = 20
# After so many steps a node is killed, and some steps later another one is started.
KILL_AFTER, REPLACE_AFTER = 50, 55
RULES = f"""
name = "Python's manual"
stages = {len(STAGES)}
sequence_length = 128
target_batch = 8
microbatch = 2
precision = "bf16"
eval_every = {EVAL_EVERY}
min_replicas = 2

[model]
config = "config.json"

[tokenizer]
path = "tokenizer"

[optimizer]
lr = 3e-3
warmup_epochs = 10

[data]
kind = "jsonl"
path = "train.jsonl"

[held_out]
kind = "jsonl"
path = "held_out.jsonl"

[end]
epochs = {NUM_EPOCHS}
"""
END_OF_TEXT = "<|end|>"
NUM_HELD_OUT = 8
MAX_HELD_OUT_CHARACTERS = 2000
STALL_TIMEOUT_S = 180.0
NUM_ROWS = 14


def train(swarm: DemoSwarm) -> None:
    started = time.monotonic()
    folder = swarm.logs / "run"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=swarm.console) as progress:
            run = Run(swarm, folder, progress)
        run.train(stack)
    print(run.summary(time.monotonic() - started))
    swarm.console.print(f"Logs: {swarm.logs}", highlight=False, soft_wrap=True)
    problem = run.problem()
    if problem:
        raise DemoError(problem)


class Run:
    """One run from its rules to its end."""

    def __init__(self, swarm: DemoSwarm, folder: Path, progress: Progress) -> None:
        """Start everything."""
        self.swarm, self.folder = swarm, folder
        self.reports: list[dict[str, Any]] = []
        self.killed: Killed | None = None
        self.joined_at: int | None = None
        task = progress.add_task("Writing the rules of the run", total=3 + len(STAGES) * len(REPLICAS) + NUM_TRAINERS)
        self.num_characters = write_files(folder)
        progress.update(task, advance=1, description="Starting the bootstrap peer")
        self.address = swarm.start_bootstrap()
        progress.update(task, advance=1, description="Creating the run")
        self.run_id = self.create()
        progress.update(task, advance=1, description="Four nodes and two trainers join the run")
        self.nodes = {(stage, name): self.start_node(stage, name) for stage in range(len(STAGES)) for name in REPLICAS}
        self.trainers = [self.start_trainer(number) for number in range(1, 1 + NUM_TRAINERS)]
        members = [*self.nodes.values(), *self.trainers]
        swarm.wait_ready(members, lambda num_ready: progress.update(task, completed=3 + num_ready))
        progress.update(task, description="All of them are there")

    def create(self) -> str:
        arguments = ("--identity", str(self.folder / "owner.id"))
        child = self.swarm.start(
            "create", "swarm", "run", "create", str(self.folder / "run.toml"), *arguments, *self.common()
        )
        self.swarm.finish(child)
        assert child.log is not None
        found = re.search(r"^[0-9a-f]{64}$", child.log.read_text(encoding="utf-8"), re.M)
        if found is None:
            raise DemoError(f"`swarm run create` printed no run id{last_lines(child)}")
        return found[0]

    def start_node(self, stage: int, name: str) -> Child:
        # One thread each: there are more processes than most machines have cores.
        arguments = ("run", "--run", self.run_id, "--blocks", STAGES[stage], "--threads", "1")
        return self.swarm.start(f"node-{stage}{name}", "swarm-node", *arguments, *self.common())

    def start_trainer(self, number: int) -> Child:
        files = ("--data", str(self.folder), "--held-out", str(self.folder))
        arguments = ("train", self.run_id, "--threads", "1", "--json", "--log-file", str(self.log_of(number)))
        return self.swarm.start(f"trainer-{number}", "swarm", *arguments, *files, *self.common())

    def common(self) -> tuple[str, ...]:
        return "--initial-peers", self.address, "--cache-dir", str(self.folder / "cache")

    def log_of(self, trainer: int) -> Path:
        return self.swarm.logs / f"trainer-{trainer}.jsonl"

    def train(self, stack: ExitStack) -> None:
        """Show the epochs as they come, and let the accident happen."""
        view = View(stack)
        view.say(
            f"A LLaMA of random weights reads Python's manual ({self.num_characters:,} characters): "
            f"2 stages x 2 nodes, {NUM_TRAINERS} trainers, {NUM_EPOCHS} steps in bf16."
        )
        lines = follow(self.log_of(1))
        newcomer: Child | None = None
        last_news = time.monotonic()
        while not self.reports or self.reports[-1]["epoch"] < NUM_EPOCHS - 1:
            is_at_end = len(self.reports) and self.reports[-1]["epoch"] >= NUM_EPOCHS - 2
            self.swarm.wait(may_end=self.trainers if is_at_end else ())
            for line in next(lines):
                last_news = time.monotonic()
                self.reports.append(json.loads(line))
                view.show(self.reports[-1])
            if time.monotonic() - last_news > STALL_TIMEOUT_S:
                raise DemoError(f"no epoch was completed for {STALL_TIMEOUT_S:.0f} s; logs: {self.swarm.logs}")
            if self.killed is None and len(self.reports) >= KILL_AFTER:
                victim = self.nodes[1, "b"]
                self.swarm.kill(victim)
                self.killed = Killed(victim.name, how_ended(victim.process), len(self.reports))
                view.say(f"{victim.name}, one of the two nodes with stage 1, was {self.killed.how}. The others go on.")
            if newcomer is None and len(self.reports) >= REPLACE_AFTER:
                newcomer = self.start_node(1, "c")
                view.say(f"{newcomer.name} was started to take its place.")
            if newcomer is not None and self.joined_at is None:
                self.joined_at = epoch_of_state(newcomer)
                if self.joined_at is not None:
                    view.say(
                        f"{newcomer.name} has downloaded the stage as it is after step {self.joined_at}, and trains."
                    )
        for trainer in self.trainers:
            while trainer.process.poll() is None:
                self.swarm.wait(may_end=self.trainers)
            self.swarm.finish(trainer)

    def validation(self) -> list[float]:
        return [report["validation_loss"] for report in self.reports if report["validation_loss"] is not None]

    def summary(self, seconds: float) -> str:
        losses, validation = [report["loss"] for report in self.reports], self.validation()
        num_tokens = sum(report["num_loss_tokens"] for report in self.reports)
        assert self.killed is not None
        joined = (
            f"downloaded the weights of step {self.joined_at} from the one that was left, and trained with the others"
            if self.joined_at is not None
            else "did not get into the run in time"
        )
        return (
            f"\nloss             {losses[0]:.3f} -> {losses[-1]:.3f}\n"
            f"validation loss  {validation[0]:.3f} -> {validation[-1]:.3f}\n"
            f"steps            {len(losses)}, of {num_tokens:,} tokens together, in {seconds:.0f} s with the start\n"
            f"killed           {self.killed.name} ({self.killed.how}) after step {self.killed.num_steps}\n"
            f"joined           node-1c {joined}"
        )

    def problem(self) -> str:
        """What did not go as promised."""
        losses, validation = [report["loss"] for report in self.reports], self.validation()
        if not (losses[-1] < losses[0] and validation[-1] < validation[0]):
            return "the loss did not fall"
        if self.joined_at is None:
            return f"the new node did not join before the end of the run; logs: {self.swarm.logs}"
        return ""


@dataclass(frozen=True, slots=True)
class Killed:
    """The node that was killed."""

    name: str
    how: str
    num_steps: int


class View:
    """The last epochs in a table that is redrawn, and below it what happened; in a pipe a line for each."""

    def __init__(self, stack: ExitStack) -> None:
        self._console = Console(highlight=False)
        self._rows: list[list[str]] = []
        self._said: list[str] = []
        self._first_loss = 0.0
        self._live = None
        if self._console.is_terminal:
            self._live = stack.enter_context(Live(console=self._console, auto_refresh=False))

    def say(self, text: str) -> None:
        self._said.append(text)
        self._draw(f"* {text}")

    def show(self, report: dict[str, Any]) -> None:
        loss, validation = report["loss"], report["validation_loss"]
        self._first_loss = self._first_loss or loss
        *stages, trainers = report["replicas"]
        self._rows.append(
            [
                f"{report['epoch'] + 1}/{NUM_EPOCHS}",
                f"{loss:.3f}",
                "-" if validation is None else f"{validation:.3f}",
                f"{report['tokens_per_s']:.0f}",
                f"{'+'.join(map(str, stages))} + {trainers}",
                "=" * round(30 * loss / self._first_loss),
            ]
        )
        step, loss_cell, validation_cell, speed, members, bar = self._rows[-1]
        validated = "" if validation is None else f"  validation {validation_cell}"
        self._draw(
            f"step {step:>5}  loss {loss_cell}  {bar:30}  {speed:>4} tokens/s  nodes + trainers {members}{validated}"
        )

    def _draw(self, line: str) -> None:
        if self._live is None:
            print(line, flush=True)
            return
        table = Table()
        for title in ("step", "loss", "validation", "tokens/s", "nodes by stage + trainers"):
            table.add_column(title, justify="right")
        table.add_column("loss, of the first one")
        for row in self._rows[-NUM_ROWS:]:
            table.add_row(*row)
        self._live.update(Group(table, *(Text(f"* {text}") for text in self._said)), refresh=True)


def follow(path: Path) -> Iterator[list[str]]:
    """Each time the complete lines that have been added since."""
    offset = 0
    while True:
        content = path.read_bytes()[offset:] if path.exists() else b""
        whole, newline, _ = content.rpartition(b"\n")
        offset += len(whole) + len(newline)
        yield whole.decode().splitlines()


def epoch_of_state(node: Child) -> int | None:
    """The epoch of the state that a node has downloaded, once it has."""
    assert node.log is not None
    found = re.search(r"state installed epoch=(\d+)", node.log.read_text(encoding="utf-8", errors="replace"))
    return int(found[1]) if found else None


def write_files(folder: Path) -> int:
    """All that the run consists of: rules, config, tokenizer, data. Returns how many characters there are to learn from."""
    training, held_out = read_manual()
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "run.toml").write_text(RULES, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for name, texts in (("train", training), ("held_out", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    write_tokenizer(folder / "tokenizer", training)
    return sum(map(len, training))


def read_manual() -> tuple[list[str], list[str]]:
    """The topics of Python's help(), as texts to train on and texts that are held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError("this Python comes without pydoc_data, whose text the model reads: use another one") from error
    texts = [topics[name].strip() for name in sorted(topics)]
    short = [text for text in texts if len(text) <= MAX_HELD_OUT_CHARACTERS]
    held_out = short[:: max(1, len(short) // NUM_HELD_OUT)][:NUM_HELD_OUT]
    return [text for text in texts if text not in held_out], held_out


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """A byte-level BPE of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
