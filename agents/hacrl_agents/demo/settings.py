"""The demo's settings: what `hacrl demo` runs, in one place, so that the report can name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from hacrl_agents.errors import SettingsError
from hacrl_agents.settings import OBJECTIVES

POOL: Final = "demo"
PROMPT_SET: Final = "sums"
CONTROL_POOL_PREFIX: Final = "alone-"
HELD_OUT_PROMPTS: Final = 600


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How the demo trains. Chosen by measurement: docs/demo.md tells the figures."""

    objective: str = "hacpo"
    steps: int = 40
    seed: int = 0
    prompts_per_step: int = 24
    group_size: int = 8
    minibatch_prompts: int = 12
    learning_rate: float = 1e-4
    beta2: float = 0.99
    warmup_steps: int = 5
    own_clip: float = 0.05
    alpha: float = 1.0
    delta: float = 0.2
    delta_step: float = 0.025
    max_tokens: int = 36
    publish_timeout_seconds: float = 120.0
    verify_timeout_seconds: float = 60.0
    success_threshold: float = 0.999
    """Some scorers give partial credit to wrong answers."""
    evaluations: int = field(default=6, repr=False)
    """Points of the learning curves after the start."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise SettingsError(f"objective is {self.objective!r}: choose one of {', '.join(OBJECTIVES)}.")

    @property
    def training_prompts(self) -> int:
        """Prompts of the pool: every one is answered once."""
        return self.prompts_per_step * self.steps

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return max(1, self.steps // self.evaluations)

    def agent_arguments(self, *, objective: str) -> list[str]:
        """The options of `hacrl agent` that both the joint run and the control use."""
        return [
            *("--objective", objective),
            *("--seed", str(self.seed)),
            *("--lr", str(self.learning_rate)),
            *("--beta2", str(self.beta2)),
            *("--warmup-steps", str(self.warmup_steps)),
            *("--minibatch-prompts", str(self.minibatch_prompts)),
            *("--own-clip", str(self.own_clip)),
            *("--alpha", str(self.alpha)),
            *("--delta", str(self.delta)),
            *("--delta-step", str(self.delta_step)),
            *("--max-tokens", str(self.max_tokens)),
        ]
