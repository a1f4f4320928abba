"""A policy: a causal language model with its tokenizer and what both say about ends and limits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hacrl_agents.errors import ModelLoadError
from hacrl_agents.tokens import tokenizer_fingerprint
from hacrl_exchange.types import ModelSpec

_UNLIMITED = 2**31 - 1
_LOADING_FAILURES = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    ImportError,
    TypeError,
    AttributeError,
    SafetensorError,
)
"""What transformers and safetensors raise for folders that are missing, damaged or of an unknown kind."""


@dataclass(frozen=True)
class Policy:
    """A model under training, in evaluation mode throughout: dropout would be measured as a policy change."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    eos_id: int
    """The end token that own responses get back after a restart, and that a peer's bare end becomes."""
    end_ids: frozenset[int]
    """All tokens that end a response; `eos_id` is one of them."""
    pad_id: int
    max_positions: int
    """Tokens of prompt and response together."""
    vocabulary_size: int
    """Rows of the embedding: ids from here on don't exist."""
    keeps_logits: bool
    """The model computes the logits of the last positions alone when told to."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def spec(self, name: str) -> ModelSpec:
        """Returns what peers are told of this model."""
        return ModelSpec(
            model=name,
            architecture=type(self.model).__name__,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            tokenizer_fingerprint=self.fingerprint,
        )


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Returns the policy of a model in memory.

    Raises:
        ModelLoadError: if the tokenizer has no end token or ids that the model lacks, or the model no cache.
    """
    ends = _end_ids(model, tokenizer)
    if not ends:
        raise ModelLoadError("The tokenizer has no end token: set eos_token, or responses would never end.")
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes:
        raise ModelLoadError(
            f"{type(model).__name__} takes no key-value cache, which the sampler needs: use a model with "
            "attention (hybrids are fine)."
        )
    embedding = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    if len(tokenizer) > size:
        raise ModelLoadError(
            f"The tokenizer has {len(tokenizer)} tokens but the model only {size} embeddings: "
            "they don't belong together."
        )
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        fingerprint=tokenizer_fingerprint(tokenizer),
        eos_id=int(eos),
        end_ids=frozenset(ends),
        pad_id=int(pad),
        max_positions=int(limit) if limit else _UNLIMITED,
        vocabulary_size=size,
        keeps_logits="logits_to_keep" in takes,
    )


def load_policy(path: str | Path, *, device: str = "cpu") -> Policy:
    """Loads a model (float32: smaller types lose updates of 1e-6) and its tokenizer from a folder or the hub.

    Raises:
        ModelLoadError: if that fails for whatever reason, or weights are missing.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shown = str(path)
    looks_local = isinstance(path, Path) or shown.startswith((".", "/", "~"))
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelLoadError(
            f"There is no model folder {shown}: give --model a folder written by save_pretrained, or a hub "
            "name."
        )
    source = str(Path(path).expanduser()) if looks_local else shown
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        model = model.to(torch.device(device))
    except _LOADING_FAILURES as error:
        raise ModelLoadError(
            f"The model {shown} cannot be loaded ({_first_line(error)}): give --model a folder written by "
            "save_pretrained, or a hub name."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"The model {shown} lacks {len(missing)} weights, {missing[0]} for one: the folder is incomplete "
            "or holds another architecture."
        )
    return make_policy(model, tokenizer)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokenizer's end token and those of the model's generation settings."""
    ends: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for stated in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        if isinstance(stated, int):
            ends.add(stated)
        elif stated is not None:
            ends.update(int(each) for each in stated)
    return ends


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
