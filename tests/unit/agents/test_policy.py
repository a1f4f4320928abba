from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hacrl_agents.errors import ModelLoadError
from hacrl_agents.logprobs import Row, all_log_probs
from hacrl_agents.policy import Policy, load_policy, make_policy
from hacrl_agents.samplers.transformers import SamplingRequest, sample


def saved(policy: Policy, folder: Path) -> Path:
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_model_is_loaded_with_its_tokenizer(qwen: Policy, tmp_path: Path) -> None:
    loaded = load_policy(saved(qwen, tmp_path))

    assert (loaded.fingerprint, loaded.eos_id, loaded.pad_id) == (qwen.fingerprint, 1, 0)
    assert not loaded.model.training


def test_peers_are_told_architecture_size_and_fingerprint(qwen: Policy) -> None:
    spec = qwen.spec("my-model")

    assert (spec.model, spec.architecture) == ("my-model", "Qwen3ForCausalLM")
    assert spec.parameters == sum(p.numel() for p in qwen.model.parameters())
    assert spec.tokenizer_fingerprint == qwen.fingerprint


def test_all_end_tokens_of_the_generation_settings_end_a_response(qwen: Policy) -> None:
    qwen.model.generation_config.eos_token_id = [1, 4]

    assert make_policy(qwen.model, qwen.tokenizer).end_ids == {1, 4}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^There is no model folder .*nowhere: give --model a folder "):
        load_policy(tmp_path / "nowhere")


def test_an_empty_folder_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^The model .* cannot be loaded \("):
        load_policy(tmp_path)


def test_torn_weights_cannot_be_loaded(qwen: Policy, tmp_path: Path) -> None:
    saved(qwen, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)

    with pytest.raises(ModelLoadError, match=r"^The model .* cannot be loaded \("):
        load_policy(tmp_path)


def test_missing_weights_are_not_made_up(qwen: Policy, tmp_path: Path) -> None:
    saved(qwen, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        ModelLoadError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight for one"
    ):
        load_policy(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(qwen: Policy) -> None:
    qwen.tokenizer.add_tokens([f"extra{i}" for i in range(20)])

    with pytest.raises(ModelLoadError, match=r"they don't belong together\.$"):
        make_policy(qwen.model, qwen.tokenizer)


def test_a_tokenizer_without_end_token_is_refused(qwen: Policy) -> None:
    qwen.tokenizer.eos_token = None
    qwen.model.generation_config.eos_token_id = None

    with pytest.raises(ModelLoadError, match=r"^The tokenizer has no end token: "):
        make_policy(qwen.model, qwen.tokenizer)


def test_a_model_without_key_value_cache_is_refused(qwen: Policy) -> None:
    config = MambaConfig(
        vocab_size=110, hidden_size=16, num_hidden_layers=1, state_size=4, bos_token_id=None, eos_token_id=1
    )

    with pytest.raises(ModelLoadError, match=r"^MambaForCausalLM takes no key-value cache, "):
        make_policy(MambaForCausalLM(config), qwen.tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral", "gemma2", "hybrid"])
def test_other_kinds_of_models_sample_what_full_forward_passes_say(kind: str, qwen: Policy) -> None:
    """Absolute positions, an offset, a sliding window, capped logits, linear attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = make_policy(build(kind), qwen.tokenizer)
    prompts = (3, 30, 31, 32, 33, 34, 4), (3, 20, 21, 4)
    answers = sample(policy, [SamplingRequest(ids, 1) for ids in prompts], max_tokens=10, temperature=0)

    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for expected in answer.token_ids:
                ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                assert ids[-1] == expected
        together, alone = (
            all_log_probs(policy, rows, micro_batch=2)[0]
            for rows in ([Row(prompt, (40, 41)), Row(prompt[:2], (50,))], [Row(prompt, (40, 41))])
        )
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def build(kind: str) -> PreTrainedModel:
    ids = {"vocab_size": 110, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    wide = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.25, **shape, **ids}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.25, **ids)
        return GPT2LMHeadModel(config)
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, init_std=0.25, **shape, **ids))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=4, **wide))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(head_dim=8, sliding_window=4, **wide))
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(head_dim=8, layer_types=layers, **experts, **linear, **wide))
