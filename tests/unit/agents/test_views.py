from __future__ import annotations

from dataclasses import replace

import pytest

from hacrl_agents.policy import Policy
from hacrl_agents.tokens import encode_response
from hacrl_agents.views import (
    END_ID_KEY,
    ForeignRules,
    Skipped,
    foreign_response_ids,
    own_response_ids,
    stale_response_ids,
)
from hacrl_exchange.types import FinishReason, Rollout

ROOMY = ForeignRules(max_tokens=50)


def rollout(text: str, ids: tuple[int, ...] | None = None, **changes: object) -> Rollout:
    made = Rollout(text, token_count=len(ids or text), logprob_sum=-1.0, token_ids=ids)
    return replace(made, **changes)  # type: ignore[arg-type]  # any field of Rollout


def test_an_own_stopped_rollout_keeps_its_ids_and_gets_its_end_token(qwen: Policy) -> None:
    # "th" sampled as two tokens stays two tokens, whatever encoding would make of it.
    assert own_response_ids(rollout("ab", (7, 8)), qwen) == (7, 8, qwen.eos_id)


def test_an_own_rollout_gets_back_the_other_end_token_that_it_ended_with(qwen: Policy) -> None:
    assert own_response_ids(rollout("ab", (7, 8), metadata={END_ID_KEY: 3}), qwen) == (7, 8, 3)


def test_an_own_rollout_at_the_limit_has_no_end_token(qwen: Policy) -> None:
    cut = rollout("ab", (7, 8), finish_reason=FinishReason.LENGTH)

    assert own_response_ids(cut, qwen) == (7, 8)


def test_an_own_rollout_that_is_only_the_end_token_is_that_token_once(qwen: Policy) -> None:
    bare = rollout("", (qwen.eos_id,), terminal_only=True)

    assert own_response_ids(bare, qwen) == (qwen.eos_id,)


def test_an_own_rollout_of_an_older_version_has_no_end_token(qwen: Policy) -> None:
    assert stale_response_ids(rollout("ab", (7, 8)), qwen) == (7, 8)


def test_own_rollouts_without_ids_cannot_be_trained_on_as_own(qwen: Policy) -> None:
    assert own_response_ids(rollout("ab"), qwen) is Skipped.NO_TOKEN_IDS
    assert stale_response_ids(rollout("ab"), qwen) == encode_response(qwen.tokenizer, "ab")


def test_a_foreign_text_is_encoded_with_the_learners_tokenizer_without_end_token(llama: Policy) -> None:
    ids = foreign_response_ids(rollout("the man"), llama, rules=ROOMY)

    assert ids == encode_response(llama.tokenizer, "the man")
    assert isinstance(ids, tuple)
    assert llama.eos_id not in ids
    assert len(ids) == 4  # "the", " ", "m", "an"


def test_a_foreign_literal_end_token_stays_text(llama: Policy) -> None:
    ids = foreign_response_ids(rollout("a<|im_end|>b"), llama, rules=ROOMY)

    assert isinstance(ids, tuple)
    assert llama.eos_id not in ids
    assert len(ids) == len("a<|im_end|>b")


def test_a_foreign_bare_end_becomes_the_learners_end_token(llama: Policy) -> None:
    bare = rollout("", (99,), terminal_only=True, token_count=1)

    assert foreign_response_ids(bare, llama, rules=ROOMY) == (llama.eos_id,)


@pytest.mark.parametrize("text", ["gr\u00fc\u00df", "\u4f60\u597d", "a\tb"])
def test_a_text_that_does_not_survive_the_round_trip_is_left_out(text: str, llama: Policy) -> None:
    assert foreign_response_ids(rollout(text), llama, rules=ROOMY) is Skipped.ROUND_TRIP


def test_an_empty_foreign_text_is_left_out(llama: Policy) -> None:
    assert foreign_response_ids(rollout("", (5,)), llama, rules=ROOMY) is Skipped.EMPTY


def test_a_foreign_rollout_over_the_limit_is_left_out(llama: Policy) -> None:
    assert foreign_response_ids(rollout("abcd"), llama, rules=ForeignRules(3)) is Skipped.OVER_LIMIT
    assert isinstance(foreign_response_ids(rollout("abc"), llama, rules=ForeignRules(3)), tuple)


def test_a_foreign_rollout_over_the_limit_is_truncated_on_request(llama: Policy) -> None:
    ids = foreign_response_ids(rollout("abcd"), llama, rules=ForeignRules(3, truncate=True))

    assert ids == encode_response(llama.tokenizer, "abc")


def test_a_peer_with_the_same_tokenizer_lends_its_ids(llama: Policy) -> None:
    spelled = encode_response(llama.tokenizer, "t") + encode_response(llama.tokenizer, "he")
    lent = rollout("the", spelled)

    assert foreign_response_ids(lent, llama, rules=ROOMY, same_tokenizer=True) == spelled
    assert foreign_response_ids(lent, llama, rules=ROOMY) == encode_response(llama.tokenizer, "the")


@pytest.mark.parametrize("claim", ["other text", "end token inside", "unknown id", "wrong count"])
def test_lent_ids_that_contradict_the_text_are_replaced_by_the_texts_own(claim: str, llama: Policy) -> None:
    honest = encode_response(llama.tokenizer, "ab")
    claims = {
        "other text": rollout("ab", encode_response(llama.tokenizer, "xy")),
        "end token inside": rollout("ab", (honest[0], llama.eos_id, honest[1])),
        "unknown id": rollout("ab", (10**6, 10**6)),
        "wrong count": rollout("ab", honest, token_count=1),
    }

    assert foreign_response_ids(claims[claim], llama, rules=ROOMY, same_tokenizer=True) == honest
