"""Checkpoints: a folder per step that is a model folder, too, and from which training goes on bit for bit.

    checkpoints/step-00000012/   what save_pretrained writes (safetensors, config, tokenizer)
                                 optimizer.safetensors, random.safetensors, state.json
A checkpoint is written beside its place, synced, and renamed: it exists whole or not at all. Nothing in it is
pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hacrl_agents.errors import CheckpointError
from hacrl_agents.policy import Policy

_FORMAT = 1
_PREFIX = "step-"
_KEPT = 2
"""Checkpoints kept, the newest included."""


@dataclass(frozen=True)
class TrainerState:
    """Where a trainer stands, beside its weights."""

    pool: str
    agent: str
    step: int = 0
    """The last step of the pool that was trained on or skipped; `resume_after` of the next join."""
    steps_trained: int = 0
    updates: int = 0
    """Optimizer updates since the model's start."""


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint in the folder, or None."""
    found = sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    return found[-1] if found else None


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, *, state: TrainerState
) -> Path:
    """Writes the checkpoint of a step durably, removes older ones, and returns its path."""
    final = folder / f"{_PREFIX}{state.step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.model.save_pretrained(partial)
    policy.tokenizer.save_pretrained(partial)
    save_file(_optimizer_tensors(policy, optimizer), partial / "optimizer.safetensors")
    save_file(_random_states(), partial / "random.safetensors")
    described = {"format": _FORMAT, **dataclasses.asdict(state)}
    (partial / "state.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    for path in (*sorted(partial.rglob("*")), partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    for old in sorted(folder.glob(f"{_PREFIX}*"))[:-_KEPT]:
        shutil.rmtree(old)
    return final


def read_state(path: Path) -> TrainerState:
    """Returns where a checkpoint stands.

    Raises:
        CheckpointError: if it is damaged or of a newer format.
    """
    try:
        described = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = described.pop("format")
        if version == _FORMAT:
            return TrainerState(**described)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}): remove it or use another --out."
        ) from error
    raise CheckpointError(
        f"The checkpoint {path} has format {version}, newer than {_FORMAT}: upgrade hacrl-exchange."
    )


def restore(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer and torch's random states; the weights come by loading `path` as a model.

    Raises:
        CheckpointError: if files are missing, damaged or of another model.
    """
    try:
        tensors = load_file(path / "optimizer.safetensors")
        random = load_file(path / "random.safetensors")
        _restore_optimizer(policy, optimizer, tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}): remove it or use another --out."
        ) from error
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state by "field/parameter"."""
    return {
        f"{key}/{name}": value.detach().clone().contiguous()
        for name, parameter in policy.model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(policy.model.named_parameters())
    for key, value in tensors.items():
        field, _, name = key.partition("/")
        parameter = parameters[name]
        if field != "step" and value.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)} in the model and {tuple(value.shape)} here"
            )
        optimizer.state[parameter][field] = value.to(parameter.device)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
