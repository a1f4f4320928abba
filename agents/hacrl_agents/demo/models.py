"""The demo's two agents: what they are made of. Different architecture, size and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hacrl_agents.demo.vocabularies import CHARACTERS, MERGES, build_tokenizer

_MAX_POSITIONS = 128


@dataclass(frozen=True)
class AgentDesign:
    """One agent of the demo before its first lesson."""

    name: str
    architecture: str
    pieces: tuple[str, ...]
    """The tokenizer's vocabulary beside its special tokens."""
    feed_forward: int
    """Width of the feed-forward layers."""
    parity: int
    """Which numbers it grew up with: 0 those with an even hundreds digit, 1 those with an odd one."""
    own_share: float
    """Share of its examples whose operands are both of that kind; the rest are any."""
    iterations: int
    """Warm-start updates, as planned."""
    cooldown: int
    """How many of them, at the end, anneal the learning rate."""
    seed: int
    """Of its first weights and its examples. Fixed, so that every run starts from the same two agents."""


AGENT_A: Final = AgentDesign(
    name="agent-a",
    architecture="Qwen3",
    pieces=CHARACTERS,
    feed_forward=192,
    parity=0,
    own_share=0.99,
    iterations=400,
    cooldown=140,
    seed=2,
)
AGENT_B: Final = AgentDesign(
    name="agent-b",
    architecture="Llama",
    pieces=MERGES,
    feed_forward=128,
    parity=1,
    own_share=0.99,
    iterations=360,
    cooldown=120,
    seed=1,
)
DESIGNS: Final = (AGENT_A, AGENT_B)


def build_agent(
    design: AgentDesign, *, seed: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns an untrained model (float32) and its tokenizer; without a seed those of the design."""
    tokenizer = build_tokenizer(design.pieces)
    build = _BUILDERS[design.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(design.seed if seed is None else seed)
        model = build(design, tokenizer)
    return model.eval(), tokenizer


def _qwen3(design: AgentDesign, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=design.feed_forward,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def _llama(design: AgentDesign, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=design.feed_forward,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


_BUILDERS: Final[dict[str, Callable[[AgentDesign, PreTrainedTokenizerFast], PreTrainedModel]]] = {
    "Qwen3": _qwen3,
    "Llama": _llama,
}
