"""PEFT's soft prompts, a classification head and transformers' Trainer, through a swarm: as with the same model in one process.

The swarm sends fp32 here, so that its losses and gradients are the local ones but for the order of sums (1e-5, see
test_forward_backward.py); a run repeated through the same nodes is the same bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import swarm

NUM_STEPS = 5
LOSS_TOLERANCE = 1e-4
# Adam divides a gradient by its own size, so that it makes a rounding error in a small one larger.
PROMPT_TOLERANCE = 1e-4
# PEFT uses a name that transformers is about to drop, tells what generate() does with any soft prompt, and misses the hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """PEFT would ask the hub for the config of a model that it saves a prompt for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def connect(tiny_path, tiny_swarm):
    """Makes connected clients; each leaves at the end of the module."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            swarm.connect(initial_peers=tiny_swarm.initial_peers, model=str(tiny_path), wire="fp32")
        )


@pytest.fixture(scope="module")
def connected(connect):
    return connect()


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Real text, rows of different lengths: beginnings of the pages of Python's manual."""
    texts = [topics[name] for name in sorted(topics)[:40]]
    return [dict(tokenizer(text, truncation=True, max_length=8 + index % 17)) for index, text in enumerate(texts)]


def with_prompt(base, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def prompt_of(model):
    return model.prompt_encoder["default"].embedding.weight.detach().clone()


def batches(tokenizer, rows, seed=0):
    """NUM_STEPS batches of four padded rows with labels."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [collate([rows[index] for index in order[4 * step : 4 * step + 4]]) for step in range(NUM_STEPS)]


def tune(model, batches, before_step=lambda: None):
    """Train the soft prompt on each batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in batches:
        before_step()
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class StopAt(TrainerCallback):
    """An interrupted run: it ends after a step as if it had been killed, with the checkpoint of that step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class KeepLosses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_for(model, collator, rows, output, *callbacks, max_steps=6, learning_rate=0.05):
    settings = TrainingArguments(
        str(output),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, settings, collator, Dataset.from_list(rows), callbacks=list(callbacks))


def test_tuning_a_prompt_equals_tuning_it_locally(connected, tiny_path, tokenizer, rows):
    remote, local = (with_prompt(base) for base in (connected.model(), AutoModelForCausalLM.from_pretrained(tiny_path)))
    assert torch.equal(prompt_of(remote), prompt_of(local))
    before = prompt_of(remote)
    losses = tune(remote, batches(tokenizer, rows))
    assert losses == pytest.approx(tune(local, batches(tokenizer, rows)), rel=LOSS_TOLERANCE)
    assert len(set(losses)) == NUM_STEPS
    moved = (prompt_of(local) - before).abs().max()
    assert (prompt_of(remote) - prompt_of(local)).abs().max() < PROMPT_TOLERANCE * moved


def test_a_tuned_prompt_is_saved_and_loaded(connected, tokenizer, rows, tmp_path):
    model = with_prompt(connected.model(), seed=1)
    given = batches(tokenizer, rows)
    tune(model, given)
    with torch.no_grad():
        expected = model(**given[0]).loss
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(connected.model(), tmp_path)
    assert torch.equal(prompt_of(loaded), prompt_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(**given[0]).loss, expected)


def test_a_tuned_prompt_generates_what_it_does_locally(connected, tiny_path, tokenizer, rows):
    remote, local = (with_prompt(base) for base in (connected.model(), AutoModelForCausalLM.from_pretrained(tiny_path)))
    tune(remote, batches(tokenizer, rows))
    local.load_state_dict(remote.prompt_encoder.state_dict(prefix="prompt_encoder."), strict=False)
    assert torch.equal(prompt_of(local), prompt_of(remote))
    given = tokenizer.pad(
        {"input_ids": [row["input_ids"] for row in rows[:3]]}, padding_side="left", return_tensors="pt"
    )
    texts = [model.eval().generate(**given, max_new_tokens=8, do_sample=False) for model in (remote, local)]
    assert torch.equal(*texts)
    assert not torch.equal(connected.model().generate(**given, max_new_tokens=8, do_sample=False), texts[0])


def test_a_trainer_resumes_a_prompt_from_its_checkpoint(connected, tokenizer, rows, tmp_path):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    whole, interrupted, resumed = (with_prompt(connected.model(), seed) for seed in (0, 0, 1))
    before = prompt_of(whole)
    trainer_for(whole, collator, rows, tmp_path / "whole").train()
    trainer_for(interrupted, collator, rows, tmp_path / "parts", StopAt(3)).train()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    again = trainer_for(resumed, collator, rows, tmp_path / "parts")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 6
    assert not torch.equal(prompt_of(interrupted), prompt_of(whole))
    assert not torch.equal(before, prompt_of(whole))
    assert torch.equal(prompt_of(resumed), prompt_of(whole))


def labelled(rows):
    return [{**row, "label": index % 2} for index, row in enumerate(rows)]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_classifier_equals_the_local_one(tiny_path, tiny_swarm, tokenizer, rows, padding_side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    batch = DataCollatorWithPadding(tokenizer)(labelled(rows[:6]))
    assert (batch["attention_mask"] == 0).any()
    remote = swarm.SwarmModelForSequenceClassification.from_pretrained(
        str(tiny_path), initial_peers=tiny_swarm.initial_peers, num_labels=2, wire="fp32"
    )
    local = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=2)
    try:
        with torch.no_grad():
            local.score.weight.copy_(remote.score.weight)
        actual, expected = remote(**batch), local(**batch)
        actual.loss.backward()
        expected.loss.backward()
    finally:
        remote.close()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(remote.score.weight.grad, local.score.weight.grad, rtol=1e-4, atol=1e-5)
    assert [name for name, parameter in remote.named_parameters() if parameter.requires_grad] == ["score.weight"]


def test_a_trainer_trains_a_classifier_and_resumes_it(connected, tokenizer, rows, tmp_path):
    collator, given = DataCollatorWithPadding(tokenizer), labelled(rows)[:8]
    torch.manual_seed(0)
    whole, interrupted, resumed = (connected.classifier(num_labels=2) for _ in range(3))
    interrupted.score.load_state_dict(whole.score.state_dict())
    log = KeepLosses()
    options = {"max_steps": 40, "learning_rate": 0.1}
    trainer_for(whole, collator, given, tmp_path / "whole", log, **options).train()
    assert log.losses[-1] < 0.7 * log.losses[0], log.losses
    trainer_for(interrupted, collator, given, tmp_path / "parts", StopAt(15), **options).train()
    again = trainer_for(resumed, collator, given, tmp_path / "parts", **options)
    checkpoint = tmp_path / "parts" / "checkpoint-15"
    assert load_file(checkpoint / "model.safetensors").keys() == {"score.weight"}
    again.train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(interrupted.score.weight, whole.score.weight)
    assert torch.equal(resumed.score.weight, whole.score.weight)
    fresh = connected.classifier(num_labels=2)
    fresh.load_head(checkpoint)
    assert torch.equal(fresh.score.weight, interrupted.score.weight)
    with pytest.raises(swarm.UserError, match=r"the head in .* is for \[2, 32\]"):
        connected.classifier(num_labels=3).load_head(checkpoint)
    with pytest.raises(swarm.UserError, match="holds no classification head"):
        fresh.load_head(tmp_path)


def test_clients_that_tune_at_once_do_not_disturb_each_other(connect, tokenizer, rows):
    clients = [connect(), connect()]
    given = [batches(tokenizer, rows, seed) for seed in (1, 2)]

    def probe():
        with torch.no_grad():
            return clients[0].model()(**given[0][0]).logits

    before = probe()
    alone = [tune(with_prompt(client.model(), seed), given[seed]) for seed, client in enumerate(clients)]
    models = [with_prompt(client.model(), seed) for seed, client in enumerate(clients)]
    together = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(tune, models, given, [together.wait] * 2)) == alone
    assert torch.equal(probe(), before)
