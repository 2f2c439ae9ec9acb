"""A training run through the swarm against the same training in one process: tokens/s, and where the swarm's time goes.

python benchmarks/training.py --json                    2 stages x 1 node, 1 trainer
python benchmarks/training.py --replicas 2 --json       2 stages x 2 nodes: averaging
Both train the same model on the same samples (the source text of Python's standard library) on the same cores, in turns of a few
epochs: while one process trains, the swarm's processes are there, and wait. The one process has the microbatch and the number of
threads that are fastest in a trial; every process of the swarm computes with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Threads that spin while they wait take the cores from whoever else computes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
import torch.nn.functional as F

from benchmarks.report import print_report, spread
from swarm.client.runs import publish_run
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.training.data import Batch
from tests.support.one_process_training import samples_of_run, whole_model
from tests.support.processes import LocalSwarm, Process, local_swarm, wait_until
from tests.support.training_swarm import make_run

NUM_STAGES = 2
_TEXT_BYTES = 3 * 2**20
_TRIED_MICROBATCHES = (4, 8, 16)
_TRIED_SAMPLES = 16
_LOSS_TOLERANCE = 0.02
_EPOCH_TIMEOUT_S = 600


def source_texts() -> list[str]:
    """Python's own library, file by file."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(errors="replace")
        if (size := size + len(text)) > _TEXT_BYTES:
            break
        texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE tokenizer of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def create(folder: Path, options: argparse.Namespace, **others: Any) -> RunStore:
    """others: further rules, and rules that are to be other ones."""
    texts = source_texts()
    tokenizer = folder / "bpe"
    train_tokenizer(texts, options.vocab, tokenizer)
    config = {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": -(-8 * options.hidden // 3 // 64) * 64,
        "num_hidden_layers": options.blocks,
        "num_attention_heads": max(1, options.hidden // 64),
        "num_key_value_heads": max(1, options.hidden // 64),
        "max_position_embeddings": options.tokens,
    }
    rules = {
        "tokenizer.path": str(tokenizer),
        "stages": NUM_STAGES,
        "sequence_length": options.tokens,
        "target_batch": options.batch,
        "microbatch": options.microbatch,
        "precision": "bf16",
        "averaging": "fp32",
        "delay": options.delay,
        "min_replicas": min(options.replicas, options.trainers),
        "optimizer.lr": 3e-4,
        "end.epochs": 2 + options.epochs * options.repeats,  # a warm-up, and one that nobody begins
        **others,
    }
    return make_run(folder / "run", texts=texts, config=config, **rules)


@dataclass
class OneProcess:
    """The whole model here, trained as plain transformers and torch do it."""

    spec: RunSpec
    source: Any
    epoch: int = 0
    microbatch: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._model = whole_model(self.spec).eval()
        settings = self.spec.optimizer
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )

    def try_out(self, num_samples: int) -> dict[str, float]:
        """Seconds for some samples with each microbatch and number of threads; takes the fastest. Changes no weights."""
        tried: dict[tuple[int, int], float] = {}
        for microbatch, threads in itertools.product(_TRIED_MICROBATCHES, (1, 2)):
            if microbatch <= num_samples:
                torch.set_num_threads(threads)
                batches = self._batches(microbatch, num_samples)
                self._backward(batches[:1])
                started = time.monotonic()
                self._backward(batches)
                tried[microbatch, threads] = time.monotonic() - started
        self._optimizer.zero_grad()
        self.microbatch, self.threads = min(tried, key=lambda pair: tried[pair])
        torch.set_num_threads(self.threads)
        return {f"{microbatch} rows, {threads} threads": seconds for (microbatch, threads), seconds in tried.items()}

    def train(self, num_epochs: int) -> float:
        """Seconds."""
        started = time.monotonic()
        for _ in range(num_epochs):
            self._step()
        return time.monotonic() - started

    def _step(self) -> None:
        spec = self.spec
        self.losses.append(self._backward(self._batches(self.microbatch, spec.target_batch)))
        if spec.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), spec.optimizer.clip_norm, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = spec.optimizer.lr_at(self.epoch, spec.num_epochs)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.epoch += 1

    def _batches(self, microbatch: int, num_samples: int) -> list[Batch]:
        first = self.epoch * self.spec.target_batch
        starts = range(first, first + num_samples, microbatch)
        return [self.source.batch(start, min(microbatch, first + num_samples - start)) for start in starts]

    def _backward(self, batches: list[Batch]) -> float:
        """Adds the gradient of the mean loss; the mean loss."""
        num_tokens = sum(batch.num_loss_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                logits = self._model(input_ids=batch.input_ids, use_cache=False).logits
            loss_sum = F.cross_entropy(
                logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
            )
            loss = loss_sum / num_tokens
            loss.backward()
            total += float(loss.detach())
        return total


@dataclass
class TimedSwarm:
    """The processes of a run, whose trainers stand still until they are let."""

    swarm: LocalSwarm
    store: RunStore
    folder: Path
    options: argparse.Namespace
    nodes: list[Process] = field(default_factory=list)
    trainers: list[Process] = field(default_factory=list)
    epoch: int = 0
    """The first that was not let pass."""
    env: dict[str, str] = field(default_factory=dict)
    """Of all processes."""

    def start(self) -> None:
        self._gate = self.folder / "gate"
        self._let(0)
        for stage, _ in itertools.product(self.store.spec.stages, range(self.options.replicas)):
            self.nodes.append(self._start("node", "run", "--run", self.store.run_id.hex(), "--blocks", str(stage)))
        for node in self.nodes:
            node.ready()
        for _ in range(self.options.trainers):
            flags = ["--json", "--data", str(self.folder / "run" / "data"), "--in-flight", str(self.options.in_flight)]
            self.trainers.append(self._start("trainer", "train", self.store.run_id.hex(), *flags))
        for trainer in self.trainers:
            trainer.ready()

    def train(self, num_epochs: int) -> float:
        """Seconds from letting the trainers go until the last of them has stepped."""
        started = time.monotonic()
        self._let(self.epoch + num_epochs)
        wait_until(lambda: all(self._has_stepped(m) for m in self.members), num_epochs * _EPOCH_TIMEOUT_S, "a step")
        return max(float(self.steps_of(trainer)[self.epoch - 1]["at_s"]) for trainer in self.trainers) - started

    @property
    def members(self) -> list[Process]:
        return [*self.nodes, *self.trainers]

    def steps_of(self, member: Process) -> dict[int, dict[str, Any]]:
        path = member.log_path.with_suffix(".trace")
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["epoch"]: line for line in lines}

    def cpu_s(self) -> float:
        """Of all processes, with those that they started."""
        total = 0.0
        for process in [self.swarm.bootstrap, *self.members]:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                used = one.cpu_times()
                total += used.user + used.system
        return total

    def _has_stepped(self, member: Process) -> bool:
        if not member.is_running():
            raise AssertionError(f"{member.log_path.name} ended:\n{member.log[-3000:]}")
        return self.epoch - 1 in self.steps_of(member)

    def _let(self, epoch: int) -> None:
        self.epoch = epoch
        new = self._gate.with_suffix(".new")
        new.write_text(str(epoch))
        new.replace(self._gate)

    def _start(self, kind: str, *arguments: str) -> Process:
        name = f"{kind}{len(self.swarm.processes)}"
        environment = {"TRACE": str(self.folder / f"{name}.trace"), "GATE": str(self._gate), **self.env}
        command = [sys.executable, "-m", "benchmarks.timed_member", kind, *arguments, "--threads", "1"]
        command += ["--initial-peers", ",".join(self.swarm.initial_peers), "--log-level", "info"]
        command += ["--cache-dir", str(self.folder / "run" / "cache")]
        process = Process(command, self.folder / f"{name}.log", environment)
        self.swarm.processes.append(process)
        return process


def measure(timed: TimedSwarm, one: OneProcess, options: argparse.Namespace) -> dict[str, Any]:
    timed.train(1)
    tried = one.try_out(min(options.batch, _TRIED_SAMPLES))
    print({key: round(seconds, 2) for key, seconds in tried.items()}, file=sys.stderr)
    one.train(1)
    times: dict[str, list[float]] = {"swarm": [], "one": []}
    cpu: dict[str, list[float]] = {"swarm": [], "one": [], "idle": []}
    for _ in range(options.repeats):
        before = timed.cpu_s()
        times["swarm"].append(timed.train(options.epochs))
        idle_from = timed.cpu_s()
        cpu["swarm"].append(idle_from - before)
        started = time.process_time()
        times["one"].append(one.train(options.epochs))
        cpu["one"].append(time.process_time() - started)
        cpu["idle"].append((timed.cpu_s() - idle_from) / times["one"][-1])
        seconds, cpu_seconds = ({k: round(v[-1], 2) for k, v in each.items()} for each in (times, cpu))
        print(f"seconds {seconds} of cores {cpu_seconds} load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    num_tokens = options.epochs * options.batch * options.tokens
    return {
        "ratio_to_one_process": spread([one / swarm for one, swarm in zip(times["one"], times["swarm"], strict=True)]),
        "swarm_tokens_per_s": spread([num_tokens / seconds for seconds in times["swarm"]]),
        "one_process_tokens_per_s": spread([num_tokens / seconds for seconds in times["one"]]),
        "one_process_microbatch": one.microbatch,
        "one_process_threads": one.threads,
        "swarm_cpu_s_per_epoch": spread([seconds / options.epochs for seconds in cpu["swarm"]]),
        "one_process_cpu_s_per_epoch": spread([seconds / options.epochs for seconds in cpu["one"]]),
        "swarm_idle_cpu_share": spread(cpu["idle"]),
        **stage_results(timed, options),
        **({"largest_loss_difference": compare_losses(timed, one)} if not options.delay else {}),
    }


def stage_results(timed: TimedSwarm, options: argparse.Namespace) -> dict[str, Any]:
    """What the nodes wrote down of epochs before which they did not have to wait."""
    averaging, busy, idle_ms, bytes_ratio = [], [], [], []
    num_members = len(timed.members)
    for node in timed.nodes:
        for before, after in _successive_steps(timed.steps_of(node), options):
            assert after["members"] == num_members, f"only {after['members']} members took part"
            wall_s = after["at_s"] - before["at_s"]
            averaging.append((after["averaging_s"] - before["averaging_s"]) / wall_s)
            computing = sum(after[key] - before[key] for key in ("forward_s", "backward_s"))
            busy.append(computing / wall_s)
            idle_ms.append(1000 * after["idle_s"])
            if options.replicas > 1:
                count = options.replicas
                ideal = 2 * (count - 1) / count * 4 * node.ready()["num_parameters"]
                bytes_ratio.append((after["bytes_averaged"] - before["bytes_averaged"]) / ideal)
    results = {
        "averaging_share": spread(averaging),
        "computing_share": spread(busy),
        "p50_from_last_backward_to_next_forward_ms": round(statistics.median(idle_ms), 1),
    }
    return {**results, "ratio_to_ideal_bytes_averaged": spread(bytes_ratio)} if bytes_ratio else results


def _successive_steps(steps: dict[int, Any], options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Steps of a turn, each with the one before."""
    for epoch in sorted(steps):
        if epoch > 0 and (epoch - 1) % options.epochs > 0:
            yield steps[epoch - 1], steps[epoch]


def compare_losses(timed: TimedSwarm, one: OneProcess) -> float:
    """Largest relative difference of an epoch's loss, which says whether both did the same work."""
    steps = timed.steps_of(timed.trainers[0])
    worst = max(abs(steps[epoch]["loss"] / loss - 1) for epoch, loss in enumerate(one.losses))
    assert worst < _LOSS_TOLERANCE, f"the two runs' losses differ by {worst:.1%}"
    return float(f"{worst:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1, help="nodes of each stage")
    parser.add_argument("--trainers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--batch", type=int, default=64, help="samples of an epoch")
    parser.add_argument("--microbatch", type=int, default=4, help="of the swarm; the one process has its own")
    parser.add_argument("--delay", type=int, default=0, help="epochs that gradients may be late")
    parser.add_argument("--in-flight", type=int, default=4, help="microbatches of a trainer")
    parser.add_argument("--epochs", type=int, default=2, help="of a turn")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be 2 or more: what happens between two epochs is measured, too")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = create(folder, options)
        swarm = stack.enter_context(local_swarm(folder / "swarm"))
        publish_run(store, swarm.initial_peers, 15)
        timed = TimedSwarm(swarm, store, folder, options)
        timed.start()
        one = OneProcess(store.spec, samples_of_run(store, folder / "run" / "data"))
        results = measure(timed, one, options)
        results["num_parameters_of_a_stage"] = timed.nodes[0].ready()["num_parameters"]
    parameters = {key: value for key, value in vars(options).items() if key != "json"}
    print_report("training", {**parameters, "precision": "bf16"}, results, as_json=options.json)


if __name__ == "__main__":
    main()
