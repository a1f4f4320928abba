from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hacrl_agents.errors import ModelLoadError
from hacrl_agents.policy import Policy, load_policy, make_policy


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
