"""The hooks of transformers on which SwarmModelForCausalLM relies, private ones included. A new minor version that moves one fails here."""

from __future__ import annotations

import inspect

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swarm.client.model import RemoteCache, SwarmConfig, SwarmModelForCausalLM


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_this_is_the_tested_minor_version():
    assert transformers.__version__.startswith("5.23.")


def test_generate_asks_us_for_a_cache_with_these_arguments():
    assert parameters(GenerationMixin._prepare_cache_for_generation) == [
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ]
    assert parameters(SwarmModelForCausalLM._prepare_cache_for_generation) == parameters(
        GenerationMixin._prepare_cache_for_generation
    )
    assert "_prepare_cache_for_generation" in inspect.getsource(GenerationMixin.generate)


def test_generate_calls_these_methods_of_a_cache():
    decoding = inspect.getsource(GenerationMixin)
    assert ".reorder_cache(" in decoding and ".crop(-" in decoding and ".get_seq_length()" in decoding
    for name in ("get_seq_length", "reorder_cache", "crop", "get_max_cache_shape", "activate_past_recording"):
        assert hasattr(Cache, name) or name == "get_max_cache_shape", name
        assert name in vars(RemoteCache), name
    assert RemoteCache.is_compileable is False


def test_cropping_counts_tokens_to_remove_from_the_end():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.crop(0)
    assert cache.get_seq_length() == 3


def test_the_prompt_is_cut_at_the_length_of_a_given_cache():
    source = inspect.getsource(GenerationMixin._prefill)
    assert "cache.get_seq_length()" in source and "next_sequence_length" in source


def test_the_auto_classes_know_us():
    assert AutoConfig.for_model(SwarmConfig.model_type).model_type == "shardswarm"
    assert AutoModelForCausalLM._model_mapping[SwarmConfig] is SwarmModelForCausalLM
    assert MODEL_FOR_CAUSAL_LM_MAPPING[SwarmConfig] is SwarmModelForCausalLM
    assert issubclass(SwarmModelForCausalLM, PreTrainedModel)


def test_from_pretrained_takes_a_config_and_weights_without_a_path():
    names = parameters(PreTrainedModel.from_pretrained)
    assert "config" in names and "pretrained_model_name_or_path" in names
    assert 'kwargs.pop("state_dict", None)' in inspect.getsource(PreTrainedModel.from_pretrained)
    assert 'kwargs.pop("output_loading_info", False)' in inspect.getsource(PreTrainedModel.from_pretrained)
