"""Rules of docs/sdk.md: its examples are run as tests, and it names what the SDK has."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

import hacrl_exchange
from hacrl_exchange import errors
from hacrl_exchange.client import Agent, Exchange, JointBatch, WorkerClient

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- from (\S+): (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("path", "mark", "shown"), EXAMPLES, ids=[mark for _, mark, _ in EXAMPLES])
def test_an_example_is_cut_out_of_a_test(path: str, mark: str, shown: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    cut = source.split(f"# -- start {mark} --\n")[1].split(f"# -- end {mark} --")[0].rpartition("\n")[0]

    assert textwrap.dedent(cut).strip() == shown.strip()


def test_there_are_examples() -> None:
    assert [mark for _, mark, _ in EXAMPLES] == ["loop", "rewards", "resume"]


def test_every_error_the_page_names_exists() -> None:
    named = set(re.findall(r"`(\w+Error)`", PAGE)) - {"TimeoutError"}

    assert named
    assert not [name for name in named if not hasattr(errors, name)]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(JointBatch)])
def test_every_field_of_a_batch_is_explained(field: str) -> None:
    told = PAGE + " `pool` `step` `close_time` "  # these need no explanation

    assert re.search(rf"`(batch\.)?{field}`|`{field}`|batch\.{field}", told)


@pytest.mark.parametrize(
    "method",
    [
        *(f"{kind.__name__}.{name}" for kind in (Exchange, WorkerClient) for name in vars(kind)),
        "Agent.steps",
        "Agent.publish",
        "Agent.session",
        "Agent.spec",
    ],
)
def test_every_public_method_is_named(method: str) -> None:
    name = method.partition(".")[2]
    if name.startswith("_") or name == "close":
        return

    assert re.search(rf"\b{name}\b", PAGE)


def test_the_page_imports_what_the_package_exports() -> None:
    (names,) = re.findall(r"from hacrl_exchange import ([\w, ]+)", PAGE)

    assert set(names.split(", ")) <= set(hacrl_exchange.__all__)
    assert Agent.__name__ in hacrl_exchange.__all__
