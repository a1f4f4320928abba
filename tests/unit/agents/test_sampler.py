from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hacrl_agents.errors import PromptTooLongError
from hacrl_agents.logprobs import Row, all_log_probs
from hacrl_agents.policy import Policy
from hacrl_agents.samplers.transformers import (
    SampledResponse,
    SamplingRequest,
    sample,
    sampling_seed,
)

SHORT = (3, 20, 21, 4)
LONG = (3, 30, 31, 32, 33, 34, 4)
KINDS = pytest.mark.parametrize("kind", ["qwen", "llama"])


def flat(answers: list[list[SampledResponse]]) -> list[SampledResponse]:
    return [response for group in answers for response in group]


def greedy_by_hand(policy: Policy, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The likeliest tokens by a full forward pass per token, without cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] in policy.end_ids:
                break
    return tuple(ids[len(prompt) :])


@KINDS
def test_greedy_decoding_with_cache_and_padding_equals_full_forward_passes(
    kind: str, new_policy: Callable[..., Policy]
) -> None:
    policy = new_policy(kind)
    requests = [SamplingRequest(prompt, 1) for prompt in (LONG, SHORT)]
    found = flat(sample(policy, requests, max_tokens=12, temperature=0))

    for prompt, response in zip((LONG, SHORT), found, strict=True):
        expected = greedy_by_hand(policy, prompt, 12)
        ended = expected[-1] in policy.end_ids
        assert response.token_ids == (expected[:-1] if ended else expected)
        assert (response.end_id is not None) == ended


@KINDS
def test_a_prompt_is_answered_the_same_beside_longer_ones_and_alone(
    kind: str, new_policy: Callable[..., Policy]
) -> None:
    policy = new_policy(kind)
    short, long = SamplingRequest(SHORT, 5, seed=1), SamplingRequest(LONG, 4, seed=2)

    together = sample(policy, [short, long], max_tokens=20)
    assert together == [*sample(policy, [short], max_tokens=20), *sample(policy, [long], max_tokens=20)]
    assert together == sample(policy, [short, long], max_tokens=20, batch_rows=1)


def test_equal_seeds_give_equal_answers_and_others_give_others(qwen: Policy) -> None:
    def answers(seed: int) -> list[SampledResponse]:
        return flat(sample(qwen, [SamplingRequest(SHORT, 6, seed)], max_tokens=16))

    assert answers(7) == answers(7)
    assert answers(7) != answers(8)
    assert len(set(answers(7))) == 6


def test_the_seed_depends_on_seed_agent_step_and_prompt() -> None:
    seeds = {
        sampling_seed(seed, agent=agent, step=step, prompt_id=prompt)
        for seed in (0, 1)
        for agent in ("a", "b")
        for step in (1, 2)
        for prompt in ("p", "q")
    }

    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sampling_does_not_touch_the_global_random_state(qwen: Policy) -> None:
    before = torch.get_rng_state()
    sample(qwen, [SamplingRequest(SHORT, 2)], max_tokens=4)

    assert torch.equal(torch.get_rng_state(), before)


def test_answers_are_drawn_from_the_models_distribution(qwen: Policy) -> None:
    with torch.no_grad():
        expected = qwen.model(input_ids=torch.tensor([SHORT])).logits[0, -1].softmax(-1)
    found = flat(sample(qwen, [SamplingRequest(SHORT, 4000, seed=3)], max_tokens=1, batch_rows=4000))
    first = torch.tensor(
        [response.token_ids[0] if response.token_ids else response.end_id for response in found]
    )
    frequency = torch.bincount(first, minlength=len(expected)) / len(found)

    # Four standard errors of the likeliest token's share.
    bound = 4 * float((expected.max() * (1 - expected.max()) / len(found)).sqrt())
    assert float((frequency - expected).abs().max()) < bound


def test_the_token_limit_includes_the_end_token_and_means_no_end(qwen: Policy) -> None:
    endless = replace(qwen, end_ids=frozenset({10**6}))
    (responses,) = sample(endless, [SamplingRequest(SHORT, 3, seed=5)], max_tokens=9)

    assert [(len(each.token_ids), each.end_id) for each in responses] == [(9, None)] * 3


def test_any_end_token_ends_a_response_and_is_reported(qwen: Policy) -> None:
    many = replace(qwen, end_ids=frozenset(range(40, 105)) | {qwen.eos_id})
    responses = flat(sample(many, [SamplingRequest(SHORT, 40, seed=5)], max_tokens=30))

    assert len({response.end_id for response in responses}) > 2
    assert not any(token in many.end_ids for response in responses for token in response.token_ids)


def test_top_p_keeps_the_smallest_set_of_likeliest_tokens(qwen: Policy) -> None:
    greedy = flat(sample(qwen, [SamplingRequest(SHORT, 1)], max_tokens=10, temperature=0))
    narrow = flat(sample(qwen, [SamplingRequest(SHORT, 5, seed=1)], max_tokens=10, top_p=1e-6))

    assert set(narrow) == set(greedy)


def test_the_models_context_limits_responses(qwen: Policy) -> None:
    narrow = replace(qwen, max_positions=len(LONG) + 2, end_ids=frozenset({10**6}))
    (long,), (short,) = sample(narrow, [SamplingRequest(LONG, 1), SamplingRequest(SHORT, 1)], max_tokens=50)

    assert (len(long.token_ids), len(short.token_ids)) == (2, 5)


def test_a_prompt_that_fills_the_context_is_refused(qwen: Policy) -> None:
    narrow = replace(qwen, max_positions=len(SHORT))

    with pytest.raises(PromptTooLongError, match=r"^A prompt of 4 tokens leaves no room in a context of 4: "):
        sample(narrow, [SamplingRequest(SHORT, 1)], max_tokens=5)


@KINDS
def test_log_probs_do_not_depend_on_padding_or_batch(kind: str, new_policy: Callable[..., Policy]) -> None:
    policy = new_policy(kind)
    rows = [Row(SHORT, (40, 41, 42)), Row(LONG, (50,)), Row(SHORT, (60, 61, 62, 63, 64, 65))]
    together = all_log_probs(policy, rows, micro_batch=3)

    for row, found in zip(rows, together, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
            full = policy.model(input_ids=ids).logits[0].float().log_softmax(-1)
        expected = torch.stack(
            [full[len(row.prompt_ids) - 1 + i, token] for i, token in enumerate(row.response_ids)]
        )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(found, all_log_probs(policy, [row], micro_batch=1)[0], atol=2e-5, rtol=0)


def test_equal_rows_in_equal_order_give_equal_bits(qwen: Policy) -> None:
    rows = [Row(SHORT, (40, 41)), Row(LONG, (50, 51, 52))]
    first, second = (all_log_probs(qwen, rows, micro_batch=1) for _ in range(2))

    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
