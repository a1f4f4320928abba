"""How a learner sees a rollout: as token ids of its own tokenizer, or not at all, with the reason.

The rules, which the tests name one by one:
1. An own rollout keeps its exact ids. If it stopped, its end token follows: stopping is trained, too.
2. A peer's rollout is its text in the learner's tokens. A peer with the same tokenizer lends its ids, if they
   are those of its text.
3. A foreign rollout has no end token: the source's mean log-prob excludes it, and both means of a ratio must
   be of the same text. So with an own rollout of an older policy version: its published mean is the source's.
4. A response that is only the end token becomes the learner's end token.
5. A text that doesn't survive encoding and decoding is left out, and so is an empty one.
6. A foreign rollout over the learner's limit is left out or, on request, truncated.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hacrl_agents.policy import Policy
from hacrl_agents.tokens import decode_response, encode_response
from hacrl_exchange.types import FinishReason, Rollout

END_ID_KEY = "end_id"
"""Metadata of an own rollout whose end token is not the policy's first one."""


class Skipped(enum.Enum):
    """Why a scored rollout is not trained on. Values are the words of metrics and reports."""

    ROUND_TRIP = "round_trip"
    EMPTY = "empty"
    OVER_LIMIT = "over_limit"
    SAMPLER_LOGPROBS = "sampler_logprobs"
    NO_TOKEN_IDS = "no_token_ids"


@dataclass(frozen=True, slots=True)
class ForeignRules:
    """What a learner does with foreign rollouts."""

    max_tokens: int
    truncate: bool = False


def own_response_ids(rollout: Rollout, policy: Policy) -> tuple[int, ...] | Skipped:
    """Returns the exact ids of an own rollout, its end token included if it has one (rules 1 and 4)."""
    if rollout.token_ids is None:
        return Skipped.NO_TOKEN_IDS
    ids = tuple(int(token) for token in rollout.token_ids)
    if rollout.terminal_only or rollout.finish_reason is FinishReason.LENGTH:
        return ids
    return (*ids, int((rollout.metadata or {}).get(END_ID_KEY, policy.eos_id)))


def stale_response_ids(rollout: Rollout, policy: Policy) -> tuple[int, ...] | Skipped:
    """Returns the ids of an own rollout of an older policy version (rules 3 and 4)."""
    if rollout.token_ids is None:
        return foreign_response_ids(rollout, policy, rules=ForeignRules(policy.max_positions))
    return tuple(int(token) for token in rollout.token_ids) or Skipped.EMPTY


def foreign_response_ids(
    rollout: Rollout, policy: Policy, *, rules: ForeignRules, same_tokenizer: bool = False
) -> tuple[int, ...] | Skipped:
    """Returns a peer's rollout in the learner's tokens (rules 2 to 6)."""
    if rollout.terminal_only:
        return (policy.eos_id,)
    ids = _lent_ids(rollout, policy) if same_tokenizer else None
    if ids is None:
        if not rollout.text:
            return Skipped.EMPTY
        ids = encode_response(policy.tokenizer, rollout.text)
        if not ids or decode_response(policy.tokenizer, ids) != rollout.text:
            return Skipped.ROUND_TRIP
    if len(ids) <= rules.max_tokens:
        return ids
    if rules.truncate and rules.max_tokens > 0:
        return ids[: rules.max_tokens]
    return Skipped.OVER_LIMIT


def _lent_ids(rollout: Rollout, policy: Policy) -> tuple[int, ...] | None:
    """Returns a peer's own ids if they exist here, hold no end token, and say what the text says."""
    if rollout.token_ids is None or len(rollout.token_ids) == 0:
        return None
    ids = tuple(int(token) for token in rollout.token_ids)
    known = all(0 <= token < policy.vocabulary_size and token not in policy.end_ids for token in ids)
    if not known or len(ids) != rollout.token_count:
        return None
    return ids if decode_response(policy.tokenizer, ids) == rollout.text else None
