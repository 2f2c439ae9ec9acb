"""A folder with all that a run needs to go on: written beside the weights of an export, read by `swarm run restore`.

    FOLDER/spec.bin, manifest.json, tokenizer/, orders.bin      the run's rules and what they name, as in swarm/run_store.py
    FOLDER/states/stage0-epoch120-LINEAGE.state                 weights and moments of each stage and the ends, all of one place,
                                                                with the Commit that proves it, as in saved_states.py

It is what a machine would have in its cache that was all members at once; to restore is to check it and to copy it there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.cache import disk_error
from swarm.epoch.messages import Place
from swarm.errors import UserError
from swarm.run_spec import RunSpec
from swarm.run_store import SPEC_FILE, RunStore, folder_of_run
from swarm.training.course import RunCourse
from swarm.training.rollback import newest
from swarm.training.saved_states import SavedAt, SavedStates
from swarm.training.standing import newest_orders

RUN_FOLDER = "run"
"""Its name in the folder of a checkpoint."""
STATES_FOLDER = "states"
ENDS = "ends"
_FIND_ANOTHER = "copy it again from where it was exported, or take an older export"


@dataclass(frozen=True, slots=True)
class Restored:
    """What is in the cache now."""

    store: RunStore
    place: Place
    stages: tuple[int, ...]
    """Whose states are; the ends count as the last one."""


def states_of(folder: Path, run_id: bytes, stage: int) -> SavedStates:
    """The states of a stage in such a folder."""
    return SavedStates(folder / STATES_FOLDER, run_id, stage)


def place_of(checkpoint: Path, run_id: bytes) -> Place | None:
    """Of which place the folder of a checkpoint is; None if it cannot be restored, or is of another run."""
    try:
        store = RunStore.load(checkpoint / RUN_FOLDER)
        found = _states_in(store, range(store.spec.num_stages)) if store.run_id == run_id else {}
    except UserError:
        return None
    return next((saved.place for saved in found.values()), None)


def restore_run(checkpoint: Path, cache_dir: Path | None = None, stages: Sequence[str] = ()) -> Restored:
    """Put the run of a checkpoint's folder into the cache, so that members that are started here go on from there.

    stages: numbers or "ends", of which the states are wanted; all, if there are none. Everything is checked before anything changes.
    Raises UserError if the folder is not whole, the disk is full, or this machine has newer states of the run.
    """
    source = RunStore.load(_run_folder(checkpoint))
    RunCourse(source)  # data that the owner has amended belongs to the run's files
    if source.missing():
        raise UserError(
            f"{source.folder} lacks files that the run's rules name (tokenizer, list of its data): {_FIND_ANOTHER}"
        )
    wanted = sorted({_stage_of(text, source.spec) for text in stages}) or [*range(source.spec.num_stages)]
    states = _states_in(source, wanted)
    place = states[wanted[0]].place
    target = folder_of_run(source.run_id, cache_dir)
    _refuse_newer(target, source, place)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".restore-") as beside:
            copy = source.copy_to(Path(beside))
            for stage, saved in states.items():
                kept = states_of(Path(beside), source.run_id, stage)
                kept.save(saved.place, saved.commit, states_of(source.folder, source.run_id, stage).read(saved))
            _keep_newest_orders(copy, source, target)
            _move_files(Path(beside), target)
    except OSError as error:
        raise disk_error(target, error) from error
    return Restored(RunStore.open(source.run_id, cache_dir), place, tuple(wanted))


def _run_folder(checkpoint: Path) -> Path:
    if (checkpoint / RUN_FOLDER / SPEC_FILE).is_file():
        return checkpoint / RUN_FOLDER
    inside = sorted(path.parent.parent.name for path in checkpoint.glob(f"*/{RUN_FOLDER}/{SPEC_FILE}"))
    if inside:
        raise UserError(f"{checkpoint} holds {len(inside)} exports: choose one, such as {checkpoint / inside[-1]}")
    raise UserError(
        f"{checkpoint} cannot be restored: it has no {RUN_FOLDER}/{SPEC_FILE}; export with --moments or --every, which keep what a run needs"
    )


def _stage_of(text: str, spec: RunSpec) -> int:
    names = {**{str(stage): stage for stage in range(len(spec.stages))}, ENDS: spec.ends_stage}
    if text not in names:
        raise UserError(f"--stage {text} is no stage of this run; its stages are {', '.join(names)}")
    return names[text]


def _states_in(store: RunStore, stages: Sequence[int]) -> dict[int, SavedAt]:
    """By stage, of the newest place that all of them have. Raises UserError if there is none."""
    found = {
        stage: {saved.place: saved for saved in states_of(store.folder, store.run_id, stage).found()}
        for stage in stages
    }
    place = newest(set.intersection(*(set(saved) for saved in found.values())))
    if place is None:
        empty = [stage for stage in stages if not found[stage]]
        names = " and ".join("the ends" if stage == store.spec.ends_stage else f"stage {stage}" for stage in empty)
        lack = f"lacks a whole state of {names}" if empty else "holds states of different epochs"
        raise UserError(f"{store.folder} {lack}: {_FIND_ANOTHER}")
    return {stage: found[stage][place] for stage in stages}


def _refuse_newer(target: Path, source: RunStore, place: Place) -> None:
    """A member would go on from its newest state, and those of other stages could not follow."""
    states = [states_of(target, source.run_id, stage) for stage in range(source.spec.num_stages)]
    here = newest(saved.place for one in states for saved in one.found())
    if here is not None and place.is_behind(here):
        raise UserError(
            f"{target} has a newer state of this run, of epoch {here.epoch}: members that are started here go on from it. "
            f"To go back to epoch {place.epoch} all the same, move that folder away on every machine"
        )


def _keep_newest_orders(copy: RunStore, source: RunStore, target: Path) -> None:
    raws = [source.read_orders(), RunStore(target, source.run_id, source.raw).read_orders()]
    _, raw = newest_orders(raws, source)
    if raw:
        copy.keep_orders(raw)


def _move_files(source: Path, target: Path) -> None:
    """On one file system. The rules come last: without them nobody finds the run."""
    for path in sorted(_files_in(source), key=lambda path: path.name == SPEC_FILE):
        goal = target / path.relative_to(source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, goal)


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
