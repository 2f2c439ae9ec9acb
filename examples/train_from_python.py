"""Take part in a training run as a trainer, from Python, and print the loss after each epoch until the run's end or Ctrl-C.

python examples/train_from_python.py RUN_ID --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW... --data corpus

RUN_ID is what `swarm run create` printed. Somebody must hold the stages: swarm-node run --run RUN_ID
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import swarm


async def train(config: swarm.TrainerConfig) -> None:
    async with swarm.open_trainer(config) as trainer:
        rules = trainer.spec
        print(f"{rules.name}: {len(rules.stages)} stages, {rules.num_epochs} epochs, {rules.target_batch} samples each")

        def show(commit) -> None:
            """A step was decided by all and taken: this is what it was made of, whoever trained on it."""
            if commit.is_skipped:
                print(f"epoch {commit.epoch}: skipped, the gradient was not finite")
                return
            loss = commit.loss_sum / max(commit.num_loss_tokens, 1)
            print(f"epoch {commit.epoch}: loss {loss:.4f}, gradient {commit.norm:.3f}, {len(commit.members)} members")

        trainer.membership.on_commit.append(show)
        await trainer.done.wait()
        if trainer.failure is not None:
            raise trainer.failure
        print(f"this trainer ran {trainer.counters.num_microbatches} microbatches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=bytes.fromhex, help="run id")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MULTIADDR")
    parser.add_argument("--data", type=Path, help="folder with the run's files, if not where its rules say")
    parser.add_argument("--threads", type=int, help="for embedding and head")
    parser.add_argument("--cache-dir", type=Path, help="where runs are kept")
    options = parser.parse_args()
    config = swarm.TrainerConfig(
        run_id=options.run,
        initial_peers=tuple(options.initial_peers),
        data=options.data,
        threads=options.threads,
        cache_dir=options.cache_dir,
    )
    asyncio.run(train(config))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except swarm.SwarmError as error:
        sys.exit(f"error: {error}")
