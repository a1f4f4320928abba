from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from hacrl_agents.cli import agent, demo
from hacrl_agents.errors import SettingsError
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.views import Skipped

app = typer.Typer()
app.command()(agent)
app.command()(demo)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["agent", "--pool", "math", "--name", "lab-a", *arguments])


def test_the_commands_are_imported_without_torch() -> None:
    code = "import sys, hacrl_agents.cli; print({'torch', 'transformers', 'grpc'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "set()"


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    result = run("--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))

    assert result.exit_code == 1
    assert result.stderr.startswith("hacrl agent: There is no model folder ")
    assert result.stderr.count("\n") == 1


def test_contradicting_settings_are_one_sentence_and_exit_code_1() -> None:
    result = run("--model", "m", "--length-norm", "source", "--over-limit", "truncate")

    assert result.exit_code == 1
    assert result.stderr == (
        "hacrl agent: length_norm source compares whole texts: it needs over_limit skip, not truncate.\n"
    )


def test_the_help_explains_every_option() -> None:
    result = CliRunner().invoke(app, ["agent", "--help"], env={"COLUMNS": "200"})

    for option in ("--model", "--own-clip", "--allow-sampler-logprobs", "--checkpoint-every", "--eval-file"):
        assert option in result.output
    assert "Stopped in any way, the same command goes on" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "ppo"}, r"^objective is 'ppo': choose one of hacpo, gspo, success_only\.$"),
        ({"micro_batch": 0}, r"^micro_batch is 0: use 1 or more\.$"),
        ({"steps": -1}, r"^steps is -1: use 0 or more\.$"),
        ({"learning_rate": float("nan")}, r"^learning_rate is nan: use a number above 0\.$"),
        ({"top_p": 1.5}, r"^top_p is 1\.5: use a number in \(0, 1\]\.$"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(TrainerSettings(), **change)  # type: ignore[arg-type]  # wrong on purpose


def test_every_option_is_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    names = [name for name in inspect.signature(agent).parameters]

    assert [name for name in names if f"`--{name.replace('_', '-')}`" not in text] == []
    assert [each.value for each in Skipped if f"| `{each.value}` |" not in text] == []
