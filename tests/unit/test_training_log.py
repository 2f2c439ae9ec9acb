"""What a trainer writes for people and programs after each epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from swarm.client.training_run import EpochReport, _jsonl, _tensorboard
from swarm.errors import UserError


def report(epoch: int, **fields: float | None) -> EpochReport:
    values = {"loss": 5.0 - epoch, "validation_loss": None, "norm": 0.5, "lr": 1e-3, "tokens_per_s": 100.0, **fields}
    return EpochReport(
        epoch=epoch,
        num_epochs=9,
        num_loss_tokens=64,
        seconds=1.5,
        replicas=(2, 2, 1),
        bytes_averaged=1000,
        is_skipped=False,
        **values,
    )


def test_a_line_of_json_for_each_epoch_is_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "epochs.jsonl"
    for epoch in range(2):
        with _jsonl(path) as write:
            write(report(epoch, loss=math.nan if epoch else 4.5))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["loss"], line["replicas"]) for line in lines] == [
        (0, 4.5, [2, 2, 1]),
        (1, None, [2, 2, 1]),
    ]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/epochs\.jsonl: .*; choose another --log-file"):
        with _jsonl(tmp_path / "file" / "epochs.jsonl"):
            pass


def test_tensorboard_shows_the_loss_by_epoch(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _tensorboard(tmp_path) as write:
        write(report(0))
        write(report(1, validation_loss=4.25))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss", "norm", "lr", "tokens_per_s"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 5.0), (1, 4.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(1, 4.25)]
