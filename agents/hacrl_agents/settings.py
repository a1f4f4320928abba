"""Settings of an agent's training. The command line's defaults are these."""

from __future__ import annotations

from dataclasses import dataclass, field

from hacrl_agents.errors import SettingsError
from hacrl_agents.hacpo_config import HacpoConfig

OBJECTIVES = ("hacpo", "gspo", "success_only")
LENGTH_NORMS = ("own", "source")
DEGRADED_RULES = ("own", "skip")
OVER_LIMIT_RULES = ("skip", "truncate")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How one agent samples and trains. Values out of range raise SettingsError."""

    objective: str = "hacpo"
    """hacpo, gspo (own samples alone) or success_only."""
    hacpo: HacpoConfig = field(default_factory=HacpoConfig)
    seed: int = 0
    steps: int = 0
    """Steps to train, counted over restarts; 0 means until the pool ends."""

    max_tokens: int = 1024
    """Tokens of a response, its end token included."""
    temperature: float = 1.0
    top_p: float = 1.0
    sample_batch: int = 512
    """Responses decoded together."""

    minibatch_prompts: int = 64
    """Prompts of one agent per optimizer update."""
    micro_batch: int = 64
    """Samples per forward and backward pass; changes memory and speed, not the result."""
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly: step i of n trains at i/n of it."""
    max_grad_norm: float = 1.0

    over_limit: str = "skip"
    """Foreign samples longer than max_tokens for this tokenizer: skip, or truncate as the paper does."""
    length_norm: str = "own"
    """own: each mean log-prob is over its own tokenizer's tokens (the paper). source: both over the source's.
    """
    allow_sampler_logprobs: bool = False
    """Learn from peers whose log-probs come from a sampling engine instead of their trainer."""
    on_degraded: str = "own"
    """A step without quorum: train on own samples alone, or skip it."""
    checkpoint_every: int = 1
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("over_limit", self.over_limit, OVER_LIMIT_RULES)
        _one_of("length_norm", self.length_norm, LENGTH_NORMS)
        _one_of("on_degraded", self.on_degraded, DEGRADED_RULES)
        if self.length_norm == "source" and self.over_limit == "truncate":
            raise SettingsError(
                "length_norm source compares whole texts: it needs over_limit skip, not truncate."
            )
        for name in ("max_tokens", "sample_batch", "minibatch_prompts", "micro_batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: use 1 or more.")
        for name in ("steps", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: use 0 or more.")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: use a number above 0.")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p is {self.top_p}: use a number in (0, 1].")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")
