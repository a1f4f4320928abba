from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hacrl_agents.checkpoint import (
    TrainerState,
    latest_checkpoint,
    read_state,
    restore,
    save_checkpoint,
)
from hacrl_agents.errors import CheckpointError
from hacrl_agents.policy import Policy
from hacrl_agents.tokens import tokenizer_fingerprint
from hacrl_agents.updates import make_optimizer

STATE = TrainerState("math", "a", step=7, steps_trained=5, updates=20)


def optimizer_of(policy: Policy) -> torch.optim.AdamW:
    return make_optimizer(policy, learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.0)


def step(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss = policy.model(input_ids=torch.tensor([[3, 20, 21, 4]])).logits.logsumexp(-1).sum()
    loss.backward()
    optimizer.step()


def test_what_is_restored_goes_on_bit_for_bit(
    llama: Policy, new_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    optimizer = optimizer_of(llama)
    step(llama, optimizer)
    path = save_checkpoint(tmp_path, llama, optimizer, state=STATE)
    drawn = torch.rand(3)
    step(llama, optimizer)

    other = new_policy("llama", seed=5)
    other.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
    again = optimizer_of(other)
    restore(path, other, again)
    assert torch.equal(torch.rand(3), drawn)
    step(other, again)

    for name, value in llama.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_checkpoint_says_where_training_stood_and_is_a_model_folder(llama: Policy, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, llama, optimizer_of(llama), state=STATE)

    assert read_state(path) == STATE
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(path)) == llama.fingerprint


def test_the_newest_checkpoint_counts_and_two_are_kept(llama: Policy, tmp_path: Path) -> None:
    optimizer = optimizer_of(llama)
    for number in (1, 2, 10):
        save_checkpoint(tmp_path, llama, optimizer, state=TrainerState("math", "a", step=number))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_a_half_written_checkpoint_does_not_count_and_is_written_anew(llama: Policy, tmp_path: Path) -> None:
    half = tmp_path / ".step-00000007.partial"
    half.mkdir()
    (half / "leftover").write_text("")

    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, llama, optimizer_of(llama), state=STATE)
    assert not (path / "leftover").exists()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_nothing_in_a_checkpoint_is_pickled(llama: Policy, tmp_path: Path) -> None:
    optimizer = optimizer_of(llama)
    step(llama, optimizer)
    path = save_checkpoint(tmp_path, llama, optimizer, state=STATE)

    assert {each.suffix for each in path.iterdir()} <= {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random.safetensors"])
def test_a_damaged_checkpoint_is_refused(name: str, llama: Policy, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, llama, optimizer_of(llama), state=STATE)
    (path / name).write_bytes(b"torn")

    with pytest.raises(CheckpointError, match=r"^The checkpoint .* cannot be read \(.*\): remove it or use "):
        restore(path, llama, optimizer_of(llama))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^The checkpoint .* cannot be read \(.*\): remove it or use another --out\.$"),
        ('{"format": 2}', r"^The checkpoint .* has format 2, newer than 1: upgrade hacrl-exchange\.$"),
        ('{"format": 1, "pool": "p"}', r"^The checkpoint .* cannot be read \("),
    ],
)
def test_an_unreadable_state_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)

    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path)


def test_the_optimizer_of_another_model_is_refused(llama: Policy, qwen: Policy, tmp_path: Path) -> None:
    optimizer = optimizer_of(qwen)
    step(qwen, optimizer)
    path = save_checkpoint(tmp_path, qwen, optimizer, state=STATE)

    with pytest.raises(CheckpointError, match=r"^The checkpoint "):
        restore(path, llama, optimizer_of(llama))
