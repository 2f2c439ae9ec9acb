"""A joiner takes part at once, while its weights are on their way for many epochs, and a donor dies meanwhile."""

from __future__ import annotations

import re
from pathlib import Path

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

NUM_EPOCHS = 60
LARGER = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4}
NUM_AWAY = 20


def test_a_joiner_whose_download_lasts_for_epochs_misses_none_of_them_though_a_donor_dies(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    rules = {"end.epochs": NUM_EPOCHS, "microbatch": 4, "optimizer.lr": 1e-3}
    store = make_run(tmp_path / "run", config=LARGER, **rules)
    expected = train_in_one_process(store.spec, samples_of_run(store, tmp_path / "run" / "data"))
    (tmp_path / "tmp").mkdir()
    with local_swarm(tmp_path / "swarm", fork_server=fork_server, env={"TMPDIR": str(tmp_path / "tmp")}) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        training = TrainingSwarm(swarm, store, tmp_path / "run")
        fault = {"on": "piece", "at": 2, "action": "SIGKILL"}
        donors = [
            training.start_node(0, cache=tmp_path / f"donor{number}", fault=fault, PIECE_EPOCHS="6")
            for number in (0, 1)
        ]
        other = training.start_node(1)
        for node in (*donors, other):  # so that none of them is a joiner
            node.ready()
        trainer = training.start_trainer()
        wait_until(lambda: len(training.steps_of(trainer)) >= 4, 60, "the run goes on")
        joiner = training.start_node(0, cache=tmp_path / "joiner")
        wait_until(lambda: training.victim() is not None, 60, "a donor dies while it gives")
        (survivor,) = [donor for donor in donors if donor is not training.victim()]
        members = [survivor, joiner, other, trainer]
        try:
            wait_until(lambda: all(NUM_EPOCHS - 1 in training.steps_of(m) for m in members), 120, "the run ends")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{joiner.log[-3000:]}\n{survivor.log[-2000:]}") from None
        installed = re.search(r"state installed epoch=(\d+) of a snapshot of epoch=(\d+)", joiner.log)
        fetched = re.findall(r"snapshot fetched epoch=\d+ donors=(\d+) bytes=(\d+)", joiner.log)
        assert installed is not None and int(installed[1]) - int(installed[2]) >= NUM_AWAY, joiner.log[-3000:]
        ready = joiner.ready()
        assert len(fetched) == 1 and int(fetched[0][1]) == 3 * 4 * ready["num_parameters"], "nothing came twice"
        steps = training.steps_of(joiner)
        assert {step["downloads"] for step in steps.values()} == {1}
        for epoch, step in training.steps_of(survivor).items():
            assert epoch not in steps or steps[epoch]["digest"] == step["digest"], f"replicas differ after {epoch}"
        assert steps[NUM_EPOCHS - 1]["units"], "it is given samples again"
        error = largest_error(weights_of_run(training, [joiner, other], trainer), expected.weights)
        assert error < 1e-5, f"largest relative error {error:.1e}"
