"""The demo's two tokenizers: one of characters, one of characters and a few longer pieces.

Both are ordinary `tokenizers` objects in transformers' fast wrapper, saved with `save_pretrained`, so that
`AutoTokenizer` loads them like anybody's. The same text has different tokens, counts and ids in each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD: Final = "<|pad|>"
EOS: Final = "<|end|>"
_UNKNOWN: Final = "<|unknown|>"
_WORDS: Final = ("Calculate ", "<answer>", "</answer>")
_CHARACTERS: Final = "0123456789+=;. "

CHARACTERS: Final[tuple[str, ...]] = (*_WORDS, *_CHARACTERS)
"""Agent A's pieces."""
MERGES: Final[tuple[str, ...]] = ("+1=", "=1", ";<answer>", " + ", *_WORDS, *reversed(_CHARACTERS))
"""Agent B's pieces: the commonest neighbours of worked answers are one token each."""

# A prompt is its messages' contents and a space that asks for the answer.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)


def build_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that cuts text into the given pieces, the longest first.

    Characters outside the pieces become the unknown token. Padding is on the left, as sampling wants it.
    """
    vocabulary = {piece: index for index, piece in enumerate((PAD, EOS, _UNKNOWN, *pieces))}
    longest_first = sorted((piece for piece in pieces if len(piece) > 1), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=_UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
