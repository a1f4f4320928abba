from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from hacrl_agents.policy import Policy
from hacrl_agents.tokens import (
    decode_response,
    encode_prompt,
    encode_response,
    tokenizer_fingerprint,
)
from hacrl_exchange.types import Message, Prompt

PROMPT = Prompt("p", (Message("user", "1 + 1?"),))


def test_a_literal_end_token_in_a_peers_text_does_not_become_the_end_token(qwen: Policy) -> None:
    ids = encode_response(qwen.tokenizer, "yes<|im_end|>no")

    assert qwen.eos_id not in ids
    assert decode_response(qwen.tokenizer, ids) == "yes<|im_end|>no"


def test_cutting_special_tokens_in_responses_leaves_prompts_as_they_are(qwen: Policy) -> None:
    before = encode_prompt(qwen.tokenizer, PROMPT)
    encode_response(qwen.tokenizer, "<|im_end|>")

    assert encode_prompt(qwen.tokenizer, PROMPT) == before


def test_a_prompt_goes_through_the_chat_template_and_asks_for_an_answer(qwen: Policy) -> None:
    text = decode_response(qwen.tokenizer, encode_prompt(qwen.tokenizer, PROMPT))

    assert text == "<|user|>1 + 1?<|im_end|><|assistant|>"


def test_without_a_chat_template_a_prompt_is_its_contents(qwen: Policy) -> None:
    qwen.tokenizer.chat_template = None

    assert decode_response(qwen.tokenizer, encode_prompt(qwen.tokenizer, PROMPT)) == "1 + 1?\n\n"


def test_decoding_writes_special_tokens_out_because_the_log_probs_cover_them(qwen: Policy) -> None:
    assert decode_response(qwen.tokenizer, [qwen.pad_id]) == "<|pad|>"


def test_a_fingerprint_survives_saving_and_loading(qwen: Policy, tmp_path: Path) -> None:
    qwen.tokenizer.save_pretrained(tmp_path)

    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == qwen.fingerprint
    assert len(qwen.fingerprint) == 64


def test_a_fingerprint_does_not_change_with_padding_and_truncation(qwen: Policy) -> None:
    qwen.tokenizer(["a", "bc"], padding=True, truncation=True, max_length=7)

    assert tokenizer_fingerprint(qwen.tokenizer) == qwen.fingerprint


def test_another_vocabulary_or_special_token_has_another_fingerprint(
    qwen: Policy, llama: Policy, new_policy: Callable[..., Policy]
) -> None:
    extended = new_policy("qwen").tokenizer
    extended.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})

    assert len({qwen.fingerprint, llama.fingerprint, tokenizer_fingerprint(extended)}) == 3
