from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hacrl_agents.exchange import JointBatch
from hacrl_agents.hacpo import joint_advantages
from hacrl_agents.lessons import Lesson, Sample, build_lesson
from hacrl_agents.logprobs import Row, all_log_probs
from hacrl_agents.policy import Policy
from hacrl_agents.rollouts import OwnGroups, OwnLogProbs, make_own_groups
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.tokens import encode_prompt
from hacrl_exchange.types import (
    FinishReason,
    Group,
    LogprobOrigin,
    PolicyVersion,
    PoolSpec,
    Prompt,
    SamplingParameters,
    Scored,
    Unscored,
    UnscoredKind,
    Verdict,
    VerifiedGroup,
)

SETTINGS = TrainerSettings(max_tokens=24, minibatch_prompts=2)
TEXTS = ("yes 1", "no", "the 2 men")
Judge = Callable[..., VerifiedGroup]


@pytest.fixture
def encoded(llama: Policy, prompts: tuple[Prompt, ...]) -> dict[str, tuple[int, ...]]:
    return {prompt.prompt_id: encode_prompt(llama.tokenizer, prompt) for prompt in prompts}


def own_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    encoded: dict[str, tuple[int, ...]],
    *,
    updates: int = 0,
    committed: dict[str, Group] | None = None,
) -> OwnGroups:
    return make_own_groups(
        policy,
        prompts,
        prompt_ids=encoded,
        committed=committed or {},
        agent="a",
        step=1,
        version=PolicyVersion(1, updates),
        group_size=3,
        settings=SETTINGS,
    )


class Lessons:
    """Builds lessons of agent "a" with peer "b", two prompts of three rollouts each."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        encoded: dict[str, tuple[int, ...]],
        *,
        spec: PoolSpec,
        judge: Judge,
        foreign_group: Callable[..., Group],
        new_batch: Callable[..., JointBatch],
    ) -> None:
        self.policy, self.prompts, self.encoded, self.spec = policy, prompts[:2], encoded, spec
        self.judge, self.foreign_group, self.new_batch = judge, foreign_group, new_batch
        self.made = own_groups(policy, self.prompts, encoded)

    def own(self) -> list[VerifiedGroup]:
        return [self.judge("a", group) for group in self.made.missing]

    def peers(self, **changes: Any) -> list[VerifiedGroup]:
        return [
            self.judge("b", self.foreign_group(prompt.prompt_id, TEXTS, **changes)) for prompt in self.prompts
        ]

    def learn(
        self,
        groups: Sequence[VerifiedGroup],
        *,
        updates: int = 0,
        own: OwnLogProbs | None = None,
        agents: Sequence[str] = ("a", "b"),
        settings: TrainerSettings = SETTINGS,
        **batch: Any,
    ) -> Lesson:
        return build_lesson(
            self.new_batch(groups, prompts=self.prompts, agents=list(agents), **batch),
            policy=self.policy,
            learner="a",
            updates=updates,
            prompt_ids=self.encoded,
            spec=self.spec,
            settings=settings,
            own=own,
        )


@pytest.fixture
def lessons(
    llama: Policy,
    prompts: tuple[Prompt, ...],
    encoded: dict[str, tuple[int, ...]],
    spec: PoolSpec,
    judge: Judge,
    foreign_group: Callable[..., Group],
    new_batch: Callable[..., JointBatch],
) -> Lessons:
    return Lessons(
        llama, prompts, encoded, spec=spec, judge=judge, foreign_group=foreign_group, new_batch=new_batch
    )


def samples(lesson: Lesson, source: str | None = None) -> list[Sample]:
    found = [sample for minibatch in lesson.plan for sample in minibatch.samples]
    return [sample for sample in found if source is None or sample.source == source]


def test_shared_sums_exclude_the_end_token_and_own_means_include_it(lessons: Lessons) -> None:
    trained = {(s.prompt_id, s.response_ids): s for s in samples(lessons.learn(lessons.own()), "a")}
    stopped = 0
    for group in lessons.made.missing:
        for rollout in group.rollouts:
            assert rollout.token_ids is not None
            ids = tuple(rollout.token_ids)
            ended = rollout.finish_reason is FinishReason.STOP and not rollout.terminal_only
            stopped += ended
            row = Row(lessons.encoded[group.prompt_id], (*ids, lessons.policy.eos_id) if ended else ids)
            (expected,) = all_log_probs(lessons.policy, [row], micro_batch=1)
            assert rollout.token_count == len(ids)
            assert rollout.logprob_sum == pytest.approx(float(expected[: len(ids)].sum()), abs=1e-4)
            sample = trained.get((group.prompt_id, row.response_ids))
            if sample is not None:  # the tests' judge leaves long texts unscored
                assert sample.is_self
                assert sample.source_mean == pytest.approx(float(expected.mean()), abs=1e-5)
    assert stopped > 0
    assert trained


def test_a_foreign_source_mean_is_the_envelopes_sum_over_its_own_token_count(lessons: Lessons) -> None:
    for sample in samples(lessons.learn([*lessons.own(), *lessons.peers(mean=-0.25)]), "b"):
        assert not sample.is_self
        assert sample.source_mean == -0.25
        assert sample.length_scale == 1


def test_length_norm_source_divides_both_sums_by_the_sources_tokens(lessons: Lessons) -> None:
    settings = replace(SETTINGS, length_norm="source")
    found = samples(lessons.learn([*lessons.own(), *lessons.peers()], settings=settings))

    by_text = {len(sample.response_ids): sample.length_scale for sample in found if sample.source == "b"}
    # "the 2 men" has 9 characters, and 7 tokens here: the, space, 2, space, m, e, n.
    assert by_text == {5: 5 / 5, 2: 2 / 2, 7: 7 / 9}
    assert {sample.length_scale for sample in found if sample.source == "a"} <= {1.0}


def test_advantages_are_those_of_the_joint_group_with_rewards_at_the_threshold(lessons: Lessons) -> None:
    groups = [*lessons.own(), *lessons.peers()]
    capabilities = {"a": 0.2, "b": 0.6}
    lesson = lessons.learn(groups, capabilities=capabilities)
    flat = [(g, v) for g in sorted(groups, key=lambda g: (g.group.prompt_id, g.agent)) for v in g.verdicts]
    rewards = [float(v.score >= 1.0) if isinstance(v, Scored) else math.nan for _, v in flat]
    expected = joint_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        [g.group.prompt_id for g, _ in flat],
        [g.agent for g, _ in flat],
        learner="a",
        capabilities=capabilities,
    )

    wanted = sorted(float(a) for a, r in zip(expected, rewards, strict=True) if not math.isnan(r))
    assert sorted(sample.advantage for sample in samples(lesson)) == pytest.approx(wanted)
    assert [sample.capability_ratio for sample in samples(lesson, "b")] == pytest.approx([3.0] * 6)


def test_a_graded_score_below_the_threshold_is_no_success(lessons: Lessons) -> None:
    def graded(text: str) -> Verdict:
        return Scored(0.9 if text == "no" else 1.0)

    peers = [lessons.judge("b", group.group, graded) for group in lessons.peers()]
    lesson = lessons.learn([*lessons.own(), *peers])

    assert lesson.sources["b"].successes == 4
    assert lesson.sources["b"].scored == 6


def test_unscored_rollouts_are_left_out_and_change_nothing(lessons: Lessons) -> None:
    unscored = Unscored(UnscoredKind.VERIFIER_ERROR)
    plain = [*lessons.own(), *lessons.peers()]
    longer = [
        replace(
            group,
            group=replace(group.group, rollouts=(*group.group.rollouts, group.group.rollouts[0])),
            verdicts=(*group.verdicts, unscored),
        )
        if group.agent == "b"
        else group
        for group in plain
    ]
    without, with_unscored = lessons.learn(plain), lessons.learn(longer)

    assert with_unscored.plan == without.plan
    assert with_unscored.sources["b"].rollouts - with_unscored.sources["b"].scored == 2


@examples(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_unscored_rollouts_of_anybody_anywhere_change_nothing(
    places: list[tuple[int, int]], lessons: Lessons
) -> None:
    plain = [*lessons.own(), *lessons.peers()]
    mixed = list(plain)
    for number, index in places:
        mixed[number] = with_unscored(mixed[number], index)
    fewer, more = lessons.learn(plain), lessons.learn(mixed)

    def essence(lesson: Lesson) -> list[tuple[str, int, list[Sample]]]:
        return [(each.source, each.planned_samples, list(each.samples)) for each in lesson.plan]

    # Means of own rollouts are recomputed in other batches, so they agree up to rounding alone.
    for (source, planned, found), (other_source, other_planned, others) in zip(
        essence(fewer), essence(more), strict=True
    ):
        assert (source, planned) == (other_source, other_planned)
        for one, other in zip(found, others, strict=True):
            assert other.source_mean == pytest.approx(one.source_mean, abs=1e-5)
            assert replace(other, source_mean=one.source_mean) == one


def with_unscored(group: VerifiedGroup, index: int) -> VerifiedGroup:
    """The group with its first rollout once more, unscored, at the index."""
    rollouts, verdicts = list(group.group.rollouts), list(group.verdicts)
    rollouts.insert(index, rollouts[0])
    verdicts.insert(index, Unscored(UnscoredKind.VERIFIER_ERROR))
    return replace(group, group=replace(group.group, rollouts=tuple(rollouts)), verdicts=tuple(verdicts))


def test_what_is_left_out_is_counted_by_agent_and_reason(lessons: Lessons) -> None:
    texts = ("gr\u00fcn", "x" * 30, "fine")
    peers = [lessons.judge("b", lessons.foreign_group(prompt.prompt_id, texts)) for prompt in lessons.prompts]
    lesson = lessons.learn([*lessons.own(), *peers])

    assert lesson.sources["b"].skipped == {"round_trip": 2, "over_limit": 2}
    assert lesson.sources["b"].trained == 2
    assert [minibatch.planned_samples for minibatch in lesson.plan] == [6, 6]


def test_hacpo_refuses_log_probs_of_a_sampling_engine_unless_allowed(lessons: Lessons) -> None:
    groups = [*lessons.own(), *lessons.peers(logprob_origin=LogprobOrigin.SAMPLER)]
    refused = lessons.learn(groups)
    allowed = lessons.learn(groups, settings=replace(SETTINGS, allow_sampler_logprobs=True))

    assert refused.sources["b"].skipped == {"sampler_logprobs": 6}
    assert not samples(refused, "b")
    assert len(samples(allowed, "b")) == 6


def test_sampling_away_from_temperature_one_is_flagged(lessons: Lessons) -> None:
    groups = [*lessons.own(), *lessons.peers(sampling=SamplingParameters(0.7, 1.0, 24))]

    assert lessons.learn(groups).sources["b"].off_policy_sampling == 6


def test_gspo_learns_from_own_samples_alone(lessons: Lessons) -> None:
    settings = replace(SETTINGS, objective="gspo")
    alone = lessons.learn(lessons.own(), settings=settings, agents=["a"])

    assert lessons.learn([*lessons.own(), *lessons.peers()], settings=settings).plan == alone.plan
    assert {sample.source for sample in samples(alone)} <= {"a"}


def test_a_step_without_quorum_is_learned_from_alone(lessons: Lessons) -> None:
    lesson = lessons.learn([*lessons.own(), *lessons.peers()], quorum_met=False)

    assert lesson.plan == lessons.learn(lessons.own()).plan


def test_success_only_learns_from_prompts_without_an_own_sample(lessons: Lessons) -> None:
    settings = replace(SETTINGS, objective="success_only")
    hacpo, success_only = lessons.learn(lessons.peers()), lessons.learn(lessons.peers(), settings=settings)

    assert {sample.advantage for sample in samples(hacpo)} == {0.0}
    assert {sample.advantage > 0 for sample in samples(success_only)} == {True, False}


def test_an_own_group_of_an_older_version_is_foreign_with_ratio_one(lessons: Lessons) -> None:
    stale = lessons.learn([*lessons.own(), *lessons.peers()], updates=4, capabilities={"a": 0.1, "b": 0.9})
    own = samples(stale, "a")

    assert stale.stale_own == len(own) > 0
    for sample in own:
        assert not sample.is_self
        assert sample.capability_ratio == 1.0
        assert lessons.policy.eos_id not in sample.response_ids[:-1]
    assert stale.plan[0].source == "a"


def test_an_own_group_whose_log_probs_are_not_this_policys_is_foreign_too(
    lessons: Lessons, new_policy: Callable[..., Policy]
) -> None:
    lessons.policy = new_policy("llama", seed=9)
    lesson = lessons.learn(lessons.own())

    assert lesson.stale_own == len(samples(lesson, "a")) > 0


def test_log_probs_computed_for_publishing_are_those_of_the_batch(lessons: Lessons) -> None:
    groups = [*lessons.own(), *lessons.peers()]

    assert lessons.learn(groups, own=lessons.made.own).plan == lessons.learn(groups).plan


def test_committed_groups_are_not_sampled_again_and_give_the_same_lesson(lessons: Lessons) -> None:
    committed = {lessons.made.missing[0].prompt_id: lessons.made.missing[0]}
    again = own_groups(lessons.policy, lessons.prompts, lessons.encoded, committed=committed)

    assert again.missing == lessons.made.missing[1:]
    assert again.own.rows == lessons.made.own.rows
    groups = lessons.own()
    assert lessons.learn(groups, own=again.own).plan == lessons.learn(groups, own=lessons.made.own).plan


def test_the_clip_bound_rises_by_the_planned_updates(lessons: Lessons) -> None:
    settings = replace(SETTINGS, minibatch_prompts=1)
    lesson = lessons.learn([*lessons.own(), *lessons.peers()], settings=settings)

    assert lesson.config.cross_step == pytest.approx(0.025 * 3 / (len(lesson.plan) - 1))
