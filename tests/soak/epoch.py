"""Random schedules of the epoch's state machine: lost, doubled and reordered messages, crashes, freezes, partitions, joiners.

    scripts/soak epoch [--schedules N] [--seed N] [--processes P]

Schedule i has the seed SEED + i, so a failure is repeated by `scripts/soak epoch --schedules 1 --seed THAT`. Prints its progress, and at the
end one JSON line with how often each fault fired; exit code 1, and the seeds, at any failure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.epoch_simulation import run_schedule

BATCH = 250
PROGRESS_S = 30.0
MAX_STAGES_LOST = 0.005
"""Share of schedules after which nobody has some stage any more: those show less."""
FAULTS_THAT_MUST_FIRE = (
    "lose",
    "double",
    "crash",
    "crash of a leader, collecting",
    "crash of a leader, round",
    "crash of a leader, committed",
    "freeze",
    "partition",
    "suspect",
    "join",
    "poison",
    "broken exchange",
)


def run_batch(seeds: range) -> tuple[Counter[str], list[str]]:
    """What happened, and what went wrong."""
    tally: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        try:
            world = run_schedule(seed)
        except AssertionError as error:
            failures.append(str(error))
            continue
        tally += world.tally()
        tally["schedules"] += 1
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    end = options.seed + options.schedules
    batches = [range(start, min(start + BATCH, end)) for start in range(options.seed, end, BATCH)]
    tally: Counter[str] = Counter()
    failures: list[str] = []
    started = told = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for counts, failed in pool.imap_unordered(run_batch, batches):
            tally += counts
            failures += failed
            for failure in failed:
                print(f"  failed: {failure}", flush=True)
            now = time.monotonic()
            if now - told > PROGRESS_S:
                told = now
                print(
                    f"  {tally['schedules']} schedules, {tally['epochs']} epochs after {now - started:.0f} s",
                    flush=True,
                )
    result = {
        "seed": options.seed,
        "processes": options.processes,
        "took_s": round(time.monotonic() - started, 1),
        **dict(sorted(tally.items())),
        "failures": failures,
    }
    print(json.dumps(result))
    unfired = [name for name in FAULTS_THAT_MUST_FIRE if not tally[name]]
    if unfired and options.schedules >= 1000:
        print(f"never fired, so nothing was shown of it: {', '.join(unfired)}", file=sys.stderr)
        return 1
    if tally["stage lost"] > MAX_STAGES_LOST * options.schedules and options.schedules >= 1000:
        print(f"{tally['stage lost']} schedules lost a stage: too many to show much", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
