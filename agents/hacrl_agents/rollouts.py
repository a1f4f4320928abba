"""Making an agent's own groups: sample, recompute log-probs with the training engine, describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hacrl_agents.logprobs import Row, all_log_probs
from hacrl_agents.policy import Policy
from hacrl_agents.samplers.transformers import SampledResponse, SamplingRequest, sample, sampling_seed
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.tokens import decode_response
from hacrl_agents.views import END_ID_KEY, Skipped, own_response_ids
from hacrl_exchange.types import (
    FinishReason,
    Group,
    LogprobOrigin,
    PolicyVersion,
    Prompt,
    Rollout,
    SamplingParameters,
)


@dataclass(frozen=True)
class OwnLogProbs:
    """Log-probs of own responses under the current weights, end tokens included; kept until those change."""

    rows: tuple[Row, ...]
    log_probs: tuple[Tensor, ...]


@dataclass(frozen=True)
class OwnGroups:
    """What an agent has to say in a step."""

    missing: tuple[Group, ...]
    """Freshly sampled, in manifest order."""
    own: OwnLogProbs
    """Of all own responses of the step, committed ones included, in manifest order."""


def make_own_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    prompt_ids: Mapping[str, tuple[int, ...]],
    committed: Mapping[str, Group],
    closed: bool = False,
    agent: str,
    step: int,
    version: PolicyVersion,
    group_size: int,
    settings: TrainerSettings,
) -> OwnGroups:
    """Samples what is not yet committed and recomputes the log-probs of everything.

    Args:
        policy: with the weights of `version`.
        prompts: of the step, in manifest order.
        prompt_ids: their encodings by prompt id.
        committed: this agent's stored groups of the step by prompt id.
        closed: nothing more can be published: what is missing stays so.
        agent: its name; part of the seed.
        step: part of the seed.
        version: goes into the envelopes.
        group_size: responses per prompt.
        settings: sampling parameters, seed and batch sizes.
    """
    missing = () if closed else [prompt for prompt in prompts if prompt.prompt_id not in committed]
    wanted = [prompt.prompt_id for prompt in missing]
    requests = [
        SamplingRequest(
            prompt_ids[prompt_id],
            group_size,
            sampling_seed(settings.seed, agent=agent, step=step, prompt_id=prompt_id),
        )
        for prompt_id in wanted
    ]
    answers = sample(
        policy,
        requests,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_rows=settings.sample_batch,
    )
    sampled = dict(zip(wanted, answers, strict=True))
    rows: list[Row] = []
    places: dict[str, int] = {}
    for prompt in prompts:
        places[prompt.prompt_id] = len(rows)
        if prompt.prompt_id in sampled:
            found = [_ids(response) for response in sampled[prompt.prompt_id]]
        elif prompt.prompt_id in committed:
            found = fresh_response_ids(committed[prompt.prompt_id], policy, updates=version.updates)
        else:
            found = []
        rows += [Row(prompt_ids[prompt.prompt_id], ids) for ids in found]
    own = OwnLogProbs(tuple(rows), tuple(all_log_probs(policy, rows, micro_batch=settings.micro_batch)))
    groups = []
    for prompt_id, responses in sampled.items():
        first = places[prompt_id]
        log_probs = own.log_probs[first : first + len(responses)]
        groups.append(_group(policy, prompt_id, responses, log_probs, version=version, settings=settings))
    return OwnGroups(tuple(groups), own)


def fresh_response_ids(group: Group, policy: Policy, *, updates: int) -> list[tuple[int, ...]]:
    """Returns the exact ids of an own group of the policy version with that many updates; [] of any other.

    Sessions don't count: another life of the agent with the same updates had the same weights.
    """
    if not group.policy_start.updates == group.policy_end.updates == updates:
        return []
    ids = [own_response_ids(rollout, policy) for rollout in group.rollouts]
    return (
        []
        if any(isinstance(each, Skipped) for each in ids)
        else [each for each in ids if isinstance(each, tuple)]
    )


def _ids(response: SampledResponse) -> tuple[int, ...]:
    return response.token_ids if response.end_id is None else (*response.token_ids, response.end_id)


def _group(
    policy: Policy,
    prompt_id: str,
    responses: Sequence[SampledResponse],
    log_probs: Sequence[Tensor],
    *,
    version: PolicyVersion,
    settings: TrainerSettings,
) -> Group:
    return Group(
        prompt_id=prompt_id,
        rollouts=tuple(
            _rollout(policy, response, found) for response, found in zip(responses, log_probs, strict=True)
        ),
        tokenizer_fingerprint=policy.fingerprint,
        policy_start=version,
        policy_end=version,
        sampling=SamplingParameters(settings.temperature, settings.top_p, settings.max_tokens),
        logprob_origin=LogprobOrigin.TRAINER,
    )


def _rollout(policy: Policy, response: SampledResponse, log_probs: Tensor) -> Rollout:
    """Describes one response. Count and sum exclude the end token, unless it is all there is."""
    terminal_only = not response.token_ids and response.end_id is not None
    ids = _ids(response) if terminal_only else response.token_ids
    shared = log_probs[: len(ids)]
    extra_end = response.end_id is not None and response.end_id != policy.eos_id and not terminal_only
    return Rollout(
        text="" if terminal_only else decode_response(policy.tokenizer, response.token_ids),
        token_count=len(ids),
        logprob_sum=float(shared.double().sum()),
        finish_reason=FinishReason.LENGTH if response.end_id is None else FinishReason.STOP,
        terminal_only=terminal_only,
        token_ids=ids,
        logprobs=tuple(shared.tolist()),
        metadata={END_ID_KEY: response.end_id} if extra_end else None,
    )
