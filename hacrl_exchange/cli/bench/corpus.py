"""Rollouts that look like a language model's: text, the token ids it is made of, and log-probs.

A made-up language of 32,768 pieces, each a space and a word of syllables, the frequent ones short. The next
token is one of a few successors of the last one, or of the group's topic, or any by Zipf's law. So a text has
about 4 characters a token, and compresses as English does: about 1.6 bytes a token alone with zstd-3, and not
below 1.2 with zstd-19, though it sees all the texts at once. Everything follows from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hacrl_exchange.types import Rollout

VOCABULARY_SIZE = 32_768
TOKENIZER_FINGERPRINT = "b" * 64
"""The language has no tokenizer that anybody could hash."""

_SUCCESSORS = 4
_SUCCESSOR_SHARE = 0.5
_TOPIC_SIZE = 120
_TOPIC_SHARE = 0.32
_ZIPF_SHIFT = 2.7
_CHUNK_GROUPS = 512
_QUANTILES = 1 << 20
_LEXICON_BATCH = 4096
_LONGEST_WORD = 12
_LOGPROB_SHAPE = 0.8
"""Of a gamma distribution: many tokens nearly certain, some surprising."""

_VOWELS, _VOWEL_WEIGHTS = "eaoiu", (12.0, 8.0, 7.5, 7.0, 2.8)
_CONSONANTS = "tnsrhldcmfpgwybvk"
_CONSONANT_WEIGHTS = (9, 7, 6.3, 6, 6, 4, 4.2, 2.8, 2.4, 2.2, 1.9, 2, 2.3, 2, 1.5, 1, 0.8)

_Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Shape:
    """How many rollouts a group has, and how many tokens a rollout."""

    rollouts: int = 8
    tokens: int = 1000

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a whole group."""
        return self.rollouts * self.tokens


class Language:
    """The pieces and their statistics. The same for every seed of a corpus."""

    def __init__(self) -> None:
        rng = np.random.default_rng(32_768)
        self.pieces: tuple[str, ...] = tuple(_lexicon(rng))
        self._zipf = _quantiles(1.0 / (np.arange(VOCABULARY_SIZE) + _ZIPF_SHIFT))
        self._ranks = _quantiles(1.0 / np.arange(1, _SUCCESSORS + 1))
        self._successors = self._draw(rng, VOCABULARY_SIZE * _SUCCESSORS)

    def groups(self, count: int, *, seed: int, shape: Shape = Shape()) -> Iterator[tuple[Rollout, ...]]:
        """Groups of rollouts, each different from every other of this and of any other seed."""
        rng = np.random.default_rng(seed)
        for start in range(0, count, _CHUNK_GROUPS):
            ids = self._ids(rng, min(_CHUNK_GROUPS, count - start), shape)
            for group in ids:
                logprobs = -rng.standard_gamma(_LOGPROB_SHAPE, size=group.shape, dtype=np.float32)
                yield tuple(map(self._rollout, group, logprobs))

    def _rollout(self, ids: _Ids, logprobs: npt.NDArray[np.float32]) -> Rollout:
        return Rollout(
            text="".join([self.pieces[token] for token in ids.tolist()]),
            token_count=len(ids),
            logprob_sum=float(logprobs.sum(dtype=np.float64)),
            token_ids=ids.astype(np.uint32),  # type: ignore[arg-type]  # an array
            logprobs=logprobs,  # type: ignore[arg-type]  # an array
        )

    def _ids(self, rng: np.random.Generator, count: int, shape: Shape) -> _Ids:
        """Token ids, (count, rollouts, tokens): all rollouts advance by a token at a time."""
        streams = count * shape.rollouts
        topics = self._draw(rng, count * _TOPIC_SIZE)
        topic_starts = np.repeat(np.arange(count) * _TOPIC_SIZE, shape.rollouts)
        ids = np.empty((shape.tokens, streams), dtype=np.int32)
        current = self._draw(rng, streams)
        for position in range(shape.tokens):
            choice = rng.random(streams, dtype=np.float32)
            successor = self._successors[current * _SUCCESSORS + self._ranks[_any(rng, streams)]]
            of_topic = topics[topic_starts + rng.integers(0, _TOPIC_SIZE, streams, dtype=np.int32)]
            other = np.where(choice < _SUCCESSOR_SHARE + _TOPIC_SHARE, of_topic, self._draw(rng, streams))
            current = np.where(choice < _SUCCESSOR_SHARE, successor, other)
            ids[position] = current
        return np.ascontiguousarray(ids.T).reshape(count, shape.rollouts, shape.tokens)

    def _draw(self, rng: np.random.Generator, count: int) -> _Ids:
        """Tokens by Zipf's law."""
        return self._zipf[_any(rng, count)]


def without_numbers(rollouts: tuple[Rollout, ...]) -> tuple[Rollout, ...]:
    """The same texts without token ids and log-probs: what agents of other tokenizers need."""
    return tuple(
        Rollout(text=one.text, token_count=one.token_count, logprob_sum=one.logprob_sum) for one in rollouts
    )


def _any(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    """Places in a table of quantiles."""
    return rng.integers(0, _QUANTILES, count, dtype=np.uint32)


def _quantiles(weights: npt.NDArray[np.floating[Any]]) -> _Ids:
    """A table that, looked up at random places, draws indices by their weights."""
    cumulative = np.cumsum(weights / weights.sum())
    places = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return np.minimum(np.searchsorted(cumulative, places), len(weights) - 1).astype(np.int32)


def _lexicon(rng: np.random.Generator) -> Iterator[str]:
    """Different pieces, the frequent ones first and short."""
    vowel_shares = np.array(_VOWEL_WEIGHTS) / sum(_VOWEL_WEIGHTS)
    consonant_shares = np.array(_CONSONANT_WEIGHTS) / sum(_CONSONANT_WEIGHTS)
    seen: set[str] = set()
    tries = 0
    while len(seen) < VOCABULARY_SIZE:
        size = (_LEXICON_BATCH, _LONGEST_WORD)
        vowels = rng.choice(list(_VOWELS), size=size, p=vowel_shares)
        consonants = rng.choice(list(_CONSONANTS), size=size, p=consonant_shares)
        odd = rng.random(_LEXICON_BATCH) < 0.6
        letters = np.where((np.arange(_LONGEST_WORD) + odd[:, None]) % 2 == 0, vowels, consonants)
        for row, wobble in zip(letters.tolist(), rng.standard_normal(_LEXICON_BATCH).tolist(), strict=True):
            # A try that meets a taken word makes the next one a little longer, so this ends.
            length = round(0.9 + 0.27 * math.log2(1 + len(seen) + 0.02 * tries) + 0.8 * wobble)
            word = "".join(row[: max(1, length)])
            if word in seen:
                tries += 1
            elif len(seen) < VOCABULARY_SIZE:
                seen.add(word)
                yield f" {word}"
