"""Any family of reasoning-gym, judged by its own scorer, on the extracted final answer only.

Many of its scorers give credit to a text that merely mentions the answer, so what is not in the answer tag is
not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from reasoning_gym import get_score_answer_fn

from hacrl_verifiers.api import Json, verifier
from hacrl_verifiers.builtin._answers import last_tagged


@verifier(name="reasoning_gym", version="1", config={"answer_tag": "answer"})
def reasoning_gym(response: str, reference: Json, *, config: Mapping[str, Json]) -> float:
    """The family's score, 0 to 1, of what the last <answer>...</answer> holds; without one a real 0.

    The reference is the data set's entry: {"question", "answer", "metadata": {"source_dataset", ...}}.
    """
    score = _scorer(_family(reference))
    answer = last_tagged(response, config["answer_tag"])
    return 0.0 if answer is None else float(score(answer, reference))


def _family(reference: Json) -> str:
    try:
        family = reference["metadata"]["source_dataset"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "The reference must be a reasoning-gym entry whose metadata names its source_dataset."
        ) from error
    return str(family)


@cache
def _scorer(family: str) -> Callable[[str, Json], float]:
    scorer: Callable[[str, Json], float] = get_score_answer_fn(family)
    return scorer
