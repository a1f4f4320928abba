"""Capability of agents: smoothed success rates and their ratios.

`P_k` is the mean of the last `window` per-step success rates of agent k, the current step included (HACPO,
equation 9). The ratio of a source j to a learner k is `w(j, k) = P_j / P_k`, clamped. The broker serves these
numbers, so this module is pure Python and imports no tensor library.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping


def success_rate(n_success: int, n_scored: int) -> float | None:
    """Returns successes over scored rollouts, or None if nothing was scored (no rate, never a rate of 0)."""
    if not 0 <= n_success <= n_scored:
        raise ValueError(f"{n_success} successes of {n_scored} scored rollouts: count the step again.")
    return n_success / n_scored if n_scored else None


def capability_ratio(
    capability_source: float | None,
    capability_learner: float | None,
    *,
    ratio_min: float = 0.1,
    ratio_max: float = 10.0,
) -> float:
    """Returns `w(source, learner) = P_source / P_learner` clamped to [ratio_min, ratio_max].

    None stands for an agent without history; the ratio is then 1.
    """
    if capability_source is None or capability_learner is None:
        return 1.0
    if not (capability_source > 0 and capability_learner > 0):
        raise ValueError("A capability must be above 0: floor success rates at a small positive number.")
    return min(max(capability_source / capability_learner, ratio_min), ratio_max)


class CapabilityWindow:
    """The last rates of every agent, step by step.

    An agent without a scored rollout in a step has no rate there and its window stays as it is. When it comes
    back, its rates older than two windows of steps are dropped: they describe another policy. An agent never
    heard of has no history, and every ratio with it is 1.
    """

    def __init__(
        self,
        agents: Iterable[str] = (),
        *,
        window: int = 5,
        floor: float = 1e-8,
        ratio_min: float = 0.1,
        ratio_max: float = 10.0,
        warmup_steps: int = 0,
    ) -> None:
        """Starts without history.

        Raises:
            ValueError: if the window is empty, the floor is not in (0, 1] or the clamp does not contain 1.
        """
        if window < 1:
            raise ValueError(f"A window of {window} steps holds nothing: use at least 1.")
        if not 0 < floor <= 1:
            raise ValueError(f"The floor {floor} is not in (0, 1]: ratios need positive rates.")
        if not 0 < ratio_min <= 1 <= ratio_max:
            raise ValueError(f"The clamp [{ratio_min}, {ratio_max}] must be positive and contain 1.")
        self._window = window
        self._floor = floor
        self._ratio_min = ratio_min
        self._ratio_max = ratio_max
        self._warmup_steps = warmup_steps
        self._step = 0
        self._rates: dict[str, deque[tuple[int, float]]] = {}
        for agent in agents:
            self._rates[agent] = deque(maxlen=window)

    def __repr__(self) -> str:
        shown = ", ".join(f"{agent}={value:.3f}" for agent, value in self.capabilities().items())
        return f"<CapabilityWindow step {self._step} [{shown}]>"

    @property
    def step(self) -> int:
        """How many steps were recorded."""
        return self._step

    def record(self, rates: Mapping[str, float]) -> None:
        """Records the rates of one step; agents without a scored rollout are simply absent.

        Call it for every step, with an empty mapping too: absences are counted in steps. Nothing is recorded
        if any rate is refused.

        Raises:
            ValueError: if a rate is not a number in [0, 1].
        """
        for agent, rate in rates.items():
            if not (math.isfinite(rate) and 0 <= rate <= 1):
                raise ValueError(f"The success rate {rate} of agent {agent!r} is not in [0, 1].")
        self._step += 1
        oldest = self._step - 2 * self._window
        for agent, rate in rates.items():
            kept = self._rates.setdefault(agent, deque(maxlen=self._window))
            while kept and kept[0][0] < oldest:
                kept.popleft()
            kept.append((self._step, max(rate, self._floor)))

    def capability(self, agent: str) -> float | None:
        """Returns the mean of the agent's window, or None without history."""
        kept = self._rates.get(agent)
        return sum(rate for _, rate in kept) / len(kept) if kept else None

    def capabilities(self) -> dict[str, float]:
        """Returns the capability of every agent that has a history, in the order the agents came."""
        found = ((agent, self.capability(agent)) for agent in self._rates)
        return {agent: value for agent, value in found if value is not None}

    def ratio(self, source: str, learner: str) -> float:
        """Returns `w(source, learner) = P_source / P_learner`, clamped; 1 in warm-up and without history."""
        if self._step <= self._warmup_steps:
            return 1.0
        return capability_ratio(
            self.capability(source),
            self.capability(learner),
            ratio_min=self._ratio_min,
            ratio_max=self._ratio_max,
        )

    def is_clamped(self, source: str, learner: str) -> bool:
        """Says whether the clamp changes the ratio now; log how often it does."""
        if self._step <= self._warmup_steps:
            return False
        unbounded = capability_ratio(
            self.capability(source), self.capability(learner), ratio_min=0.0, ratio_max=math.inf
        )
        return not self._ratio_min <= unbounded <= self._ratio_max
