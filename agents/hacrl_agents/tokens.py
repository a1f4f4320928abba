"""Text to token ids and back, by the rules that keep strangers' texts harmless.

A response is encoded apart from its prompt, without special tokens, and special tokens written out in it are
cut into pieces: a literal `<|im_end|>` in a peer's text must not become the learner's end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hacrl_exchange.types import Prompt

_FINGERPRINTED = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
"""Truncation and padding are left out: they change with use. Templates and post-processors, too: they add
nothing to a response."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns sha256 in lowercase hex over what turns responses into ids: vocabulary, merges, special tokens.

    Equal fingerprints mean that ids can be exchanged instead of text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: object = {"vocab": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    else:
        parts = json.loads(backend.to_str())
        described = {name: parts.get(name) for name in _FINGERPRINTED}
    canonical = json.dumps(described, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Returns the ids of a prompt through the tokenizer's chat template, ready to be answered.

    A base model's tokenizer without a template gets the messages' contents, one blank line after each.
    """
    if tokenizer.chat_template is None:
        plain = "".join(f"{message.content}\n\n" for message in prompt.messages)
        return tuple(tokenizer(plain)["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in prompt.messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Returns the ids of a response: no special token is added, and none is recognised in the text."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns the text of ids. Special tokens are written out: the log-probs cover them, so the text must."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
