"""The docs stay true: calls, reasons, commands and flags are all there, links resolve, examples parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from hacrl_exchange._pb import admin_service_pb2, exchange_service_pb2, verification_service_pb2
from hacrl_exchange.cli.app import load
from hacrl_exchange.cli.catalog import places
from hacrl_exchange.errors import ExchangeError, all_errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
PROTOCOL = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
SERVICES = [
    service
    for file in (exchange_service_pb2, verification_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _section(page: str, heading: str) -> str:
    """A heading's text, to the next heading of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = page.partition(f"\n{heading}\n")
    assert found, f"{heading!r} is missing"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_every_rpc_is_documented_under_its_service(service: ServiceDescriptor) -> None:
    section = _section(PROTOCOL, f"## {service.name}")

    assert re.findall(r"^### (\w+)$", section, re.MULTILINE) == [method.name for method in service.methods]


def test_the_protocol_page_names_only_reasons_that_exist() -> None:
    text = _FENCE.sub("", PROTOCOL)
    named = {word for word in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text)}
    others = {"GIVE_TO_GET"}

    assert named - others <= {error.reason for error in all_errors()}


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.reason)
def test_every_reason_is_documented_with_its_code_and_what_to_do(error: type[ExchangeError]) -> None:
    section = _section(ERRORS, f"### {error.reason}")

    assert section.startswith(f"\n`{error.code}`, `{error.__name__}`. ")
    assert "\n**Do:** " in section


def test_no_reason_is_documented_that_does_not_exist() -> None:
    assert re.findall(r"^### (\w+)$", ERRORS, re.MULTILINE) == [error.reason for error in all_errors()]


@pytest.mark.slow
def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    script = ROOT / "scripts" / "gen_cli_docs.py"
    run = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )

    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_resolves(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)

    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        links = _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links if "://" not in link}
        new = {target for target in targets if target.suffix == ".md" and target.is_file()} - reached
        reached |= new
        waiting += new

    assert [page.name for page in DOCS if page not in reached and page.name != "template.md"] == []


def _command_lines(page: Path) -> list[str]:
    """Lines of a page's shell examples that call hacrl, continuations joined, comments dropped."""
    lines = []
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("", "sh", "shell", "bash"):
            joined = re.sub(r"\\\n\s*", " ", block)
            lines += [line.strip() for line in joined.splitlines() if line.strip().startswith("hacrl ")]
    return lines


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words call, and the words left for it."""
    found: Any = load(places()[words[0]])
    rest = words[1:]
    while rest and rest[0] in getattr(found, "commands", {}):
        found, rest = found.commands[rest[0]], rest[1:]
    return found, rest


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page in PAGES for line in _command_lines(page)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_command_in_an_example_exists_with_its_options(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index("&")] if "&" in words else words
    command, rest = _command(words)
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}

    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_example_parses(page: Path) -> None:
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(block, str(page), "exec")


def test_every_decision_is_listed_with_its_title() -> None:
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    for record in sorted((ROOT / "docs/adr").glob("[0-9]*.md")):
        number, _, title = (
            record.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(": ")
        )
        assert record.name.startswith(f"{number}-")
        assert f"| [{number}]({record.name}) | {title} |" in index


def test_the_command_line_page_has_every_command() -> None:
    headings = re.findall(r"^## hacrl (\w+)$", CLI, re.MULTILINE)

    assert headings == list(places())
