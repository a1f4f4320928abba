"""Rules of the house: layout, packaging, start-up time, and the commands that the README promises."""

import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hacrl_exchange", "agents/hacrl_agents", "verifiers/hacrl_verifiers")
HEAVY = {"math-verify", "matplotlib", "reasoning-gym", "tokenizers", "torch", "transformers", "vllm"}
ENTRY_POINTS = [
    *((entry.group, entry.name) for entry in metadata.entry_points(group="hacrl.commands")),
    *((entry.group, entry.name) for entry in metadata.entry_points(group="hacrl.verifiers")),
]


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("hacrl-exchange") or []]


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def _fastest(command: Sequence[str], *, below: float, tries: int = 3) -> float:
    """Return the shortest wall time of the command in seconds; a run below the limit is the last."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT / "tests", timeout=60)
        best = min(best, time.perf_counter() - start)
        if best < below:
            break
    return best


@pytest.mark.parametrize("folder", ["agents", "verifiers"])
def test_a_source_root_is_not_a_package_because_it_would_shadow_pypis(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()


def test_the_base_install_is_light() -> None:
    base = {requirement.name for requirement in _requirements() if requirement.marker is None}

    assert base
    assert not base & HEAVY


def test_every_requirement_has_a_tested_version() -> None:
    pins = _constraints()
    wanted = [r for r in _requirements() if r.marker is None or not r.marker.evaluate({"extra": "vllm"})]

    assert not [str(r) for r in wanted if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]


def test_torch_is_pinned_exactly_and_without_a_local_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", _constraints()["torch"])


def test_the_commands_and_verifiers_of_the_distribution_are_registered() -> None:
    assert {("hacrl.commands", name) for name in ("agent", "demo", "worker")} <= set(ENTRY_POINTS)
    assert {("hacrl.verifiers", name) for name in ("boxed", "exact_match", "math", "reasoning_gym")} <= set(
        ENTRY_POINTS
    )


@pytest.mark.parametrize(("group", "name"), ENTRY_POINTS)
def test_every_entry_point_loads(group: str, name: str) -> None:
    (entry,) = metadata.entry_points(group=group, name=name)

    assert callable(entry.load())


@pytest.mark.slow
def test_the_sdk_imports_in_under_300_ms() -> None:
    seconds = _fastest([sys.executable, "-c", "import hacrl_exchange"], below=0.3)

    assert seconds < 0.3


@pytest.mark.slow
def test_help_appears_in_under_500_ms() -> None:
    hacrl = Path(sysconfig.get_path("scripts")) / "hacrl"
    seconds = _fastest([str(hacrl), "--help"], below=0.5)

    assert seconds < 0.5


@pytest.mark.parametrize("target", ["demo", "test", "check", "lint", "protos", "bench", "chaos", "docker"])
def test_make_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_shows_the_command(command: str) -> None:
    assert re.search(rf"^\s*{command}\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_images_that_make_builds_are_stages_of_the_dockerfile() -> None:
    wanted = re.findall(r"docker build --target (\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    stages = re.findall(
        r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )

    assert wanted == ["broker", "agent"]
    assert set(wanted) <= set(stages)
