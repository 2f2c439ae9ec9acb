"""What comes out of the swarm is what the same model gives in one process, token by token, in every way of generating."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
    set_seed,
)

import swarm
from tests.support.models import open_smollm2, save_tiny
from tests.support.processes import local_swarm

PROMPTS = [
    "The capital of France is",
    "1 2 3 4 5 6 7",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    ",
    "Why is the sky blue? " * 12,
    "A",
]


def both(tiny, prompts, **options):
    """(ids from the swarm, ids from the local model) for the same prompts and options."""
    remote, local, tokenizer = tiny
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=isinstance(prompts, list))
    outputs = []
    for model in (remote, local):
        set_seed(7)
        outputs.append(model.generate(**inputs, **{"max_new_tokens": 20, "do_sample": False, **options}))
    return outputs


def assert_same(tiny, prompts, **options):
    ours, theirs = both(tiny, prompts, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_identical(tiny, prompt):
    assert_same(tiny, prompt)


def test_batches_with_left_padding_are_identical(tiny):
    assert_same(tiny, PROMPTS)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}, {"num_return_sequences": 3}]
)
def test_sampled_text_is_identical_under_the_same_seed(tiny, sampling):
    assert_same(tiny, PROMPTS[:2], do_sample=True, **sampling)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}]
)
def test_beam_search_is_identical(tiny, options):
    assert_same(tiny, PROMPTS[:3], **options)


def test_prompt_lookup_and_an_assistant_model_rewind_the_caches(tiny):
    assert_same(tiny, "the quick brown the quick brown the quick", prompt_lookup_num_tokens=3)
    _, local, _ = tiny
    assert_same(tiny, PROMPTS[0], assistant_model=local)


def test_repetition_penalty_and_minimum_length_work_as_usual(tiny):
    assert_same(tiny, PROMPTS[0], repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=18)


def test_without_a_cache_the_text_is_the_same(tiny):
    assert_same(tiny, PROMPTS[0], use_cache=False, max_new_tokens=4)


def test_stopping_criteria_and_streamers_see_every_token(tiny, capsys):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 3 + num_prompt] * input_ids.shape[0])

    remote, _, tokenizer = tiny
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    num_prompt = inputs["input_ids"].shape[1]
    output = remote.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([AfterThree()]),
        streamer=TextStreamer(tokenizer),
    )
    assert output.shape[1] == num_prompt + 3
    assert tokenizer.decode(output[0]).strip() in capsys.readouterr().out


def test_logits_of_a_plain_forward_equal_the_local_ones(tiny):
    remote, local, tokenizer = tiny
    inputs = tokenizer(PROMPTS[:4], return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = local(**inputs, position_ids=positions).logits[real]
    actual = remote(**inputs).logits[real]
    # The default wire rounds to bf16 at each hop; test_forward_backward.py shows equality with fp32.
    assert 0 < (actual - expected).abs().max() < 1e-2 * expected.abs().max()


def test_returned_scores_are_the_local_ones(tiny):
    ours, theirs = both(tiny, PROMPTS[0], return_dict_in_generate=True, output_scores=True, max_new_tokens=5)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_pipeline_works_unchanged_and_prints_nothing(tiny, capfd):
    remote, local, tokenizer = tiny
    capfd.readouterr()
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPTS[0], max_new_tokens=8, do_sample=False)[0][
            "generated_text"
        ]
        for model in (remote, local)
    ]
    assert texts[0] == texts[1]
    noise = [line for line in capfd.readouterr().err.splitlines() if "Device set to use" not in line]
    assert noise == []


def test_the_model_is_a_citizen_of_the_auto_classes(tiny, tiny_path, tiny_swarm):
    remote, _, tokenizer = tiny
    assert AutoConfig.for_model("shardswarm").model_type == "shardswarm"
    assert type(remote) in AutoModelForCausalLM._model_mapping.values()
    again = swarm.SwarmModelForCausalLM.from_pretrained(str(tiny_path), initial_peers=tiny_swarm.initial_peers)
    try:
        inputs = tokenizer(PROMPTS[0], return_tensors="pt")
        assert torch.equal(
            again.generate(**inputs, max_new_tokens=5, do_sample=False),
            remote.generate(**inputs, max_new_tokens=5, do_sample=False),
        )
        assert again.config.vocab_size == remote.config.vocab_size and again.can_generate()
    finally:
        again.close()


def test_a_session_keeps_its_caches_over_turns_and_sends_only_what_is_new(tiny):
    remote, local, tokenizer = tiny
    conversation = tokenizer("user: hello swarm", return_tensors="pt")["input_ids"]
    with remote.session(max_length=200) as session:
        for turn in ("how are you", "tell me more", "and then"):
            ours = remote.generate(conversation, max_new_tokens=6, do_sample=False)
            theirs = local.generate(conversation, max_new_tokens=6, do_sample=False)
            assert torch.equal(ours, theirs)
            cached = session.get_seq_length()
            assert cached == ours.shape[1] - 1
            conversation = torch.cat([ours, tokenizer(turn, return_tensors="pt")["input_ids"]], dim=1)
        steps_before, position = session.session.stats.num_steps, session.get_seq_length()
        remote.generate(conversation, max_new_tokens=1, do_sample=False)
        assert session.session.stats.num_steps == steps_before + 1
        # A conversation that was edited in the middle is rewound to where it differs.
        edited = conversation.clone()
        edited[0, 5] = 77
        assert torch.equal(
            remote.generate(edited, max_new_tokens=4, do_sample=False),
            local.generate(edited, max_new_tokens=4, do_sample=False),
        )
        assert position > 5
    with pytest.raises(swarm.BadRequest, match="was freed"):
        remote(conversation[:, -1:], past_key_values=session)


def test_a_long_prompt_is_sent_in_pieces(fork_server, tmp_path):
    path = save_tiny("llama", tmp_path / "long", max_position_embeddings=4096)
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        nodes.start_nodes(path, "0:2", "2:4")
        with swarm.connect(initial_peers=nodes.initial_peers, model=str(path)) as connected:
            local = AutoModelForCausalLM.from_pretrained(path).eval()
            ids = torch.randint(3, 250, (2, 1300), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            mask[0, :700] = 0
            outputs = [
                m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
                for m in (connected.model(), local)
            ]
            assert torch.equal(*outputs)


@pytest.fixture(scope="module")
def families(fork_server, tmp_path_factory):
    """Models of four families on one DHT, on two nodes each; gpt2 also whole on a third one."""
    folder = tmp_path_factory.mktemp("families")
    paths = {family: save_tiny(family, folder / family) for family in ("gpt2", "bloom", "gemma2", "mixtral")}
    paths["gpt2 on one node"] = save_tiny("gpt2", folder / "gpt2-whole", seed=1)
    with local_swarm(folder / "swarm", fork_server=fork_server) as nodes:
        started = [
            nodes.start_node(path, span)
            for name, path in paths.items()
            for span in (["0:4"] if "one node" in name else ["0:2", "2:4"])
        ]
        for node in started:
            node.ready()
        yield nodes, paths


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "mixtral", "gpt2 on one node"])
def test_other_families_and_other_numbers_of_nodes_on_one_dht(families, name):
    nodes, paths = families
    with swarm.connect(initial_peers=nodes.initial_peers, model=str(paths[name])) as connected:
        tiny = (connected.model(), AutoModelForCausalLM.from_pretrained(paths[name]).eval(), connected.tokenizer())
        assert_same(tiny, PROMPTS[:3], max_new_tokens=10)
        assert_same(tiny, PROMPTS[0], num_beams=2, max_new_tokens=10)


def test_the_real_model_answers_as_it_does_locally(fork_server, tmp_path):
    """SmolLM2-135M over 1, 2 and 3 hops, with real prompts; identical to local generation in fp32."""
    with open_smollm2() as checkpoint, local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        name = str(checkpoint.folder)
        nodes.start_nodes(name, "0:10", "10:20", "20:30")
        local = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        with swarm.connect(initial_peers=nodes.initial_peers, model=name) as connected:
            tiny = (connected.model(), local, connected.tokenizer())
            for prompt in PROMPTS[:4]:
                assert_same(tiny, prompt, max_new_tokens=12)
            assert_same(tiny, PROMPTS[:5], max_new_tokens=8)
            assert_same(tiny, PROMPTS[2], do_sample=True, temperature=0.8, max_new_tokens=12)
            chat = connected.tokenizer().apply_chat_template(
                [{"role": "user", "content": "What is the capital of France?"}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            answer = connected.model().generate(**chat, max_new_tokens=12, do_sample=False)
            assert "Paris" in connected.tokenizer().decode(answer[0, chat["input_ids"].shape[1] :])
