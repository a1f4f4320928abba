"""Rules of the command line that need no broker: help, lazy loading, prompt files, durations, failures."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer

from hacrl_exchange.cli.app import application, load
from hacrl_exchange.cli.catalog import CommandPlace, extra_of, places, summary
from hacrl_exchange.cli.options import duration_text, seconds_of
from hacrl_exchange.cli.prompt_file import read_prompts
from hacrl_exchange.errors import InvalidPromptSetError
from hacrl_exchange.types import Message, Prompt, PromptEntry


def _run(*arguments: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        application()(list(arguments), prog_name="hacrl")
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


def test_help_lists_every_command_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--help") == 0
    shown = capsys.readouterr().out
    for name, place in places().items():
        assert f"  {name} " in shown
        assert summary(place).split()[0] in shown


@pytest.mark.slow
def test_help_loads_no_command() -> None:
    script = (
        "import sys; from hacrl_exchange.cli.app import application\n"
        "application()(['--help'], prog_name='hacrl', standalone_mode=False)\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    heavy = ("grpc", "numpy", "torch", "hacrl_agents.", "hacrl_verifiers.", "hacrl_exchange.broker", "rich")

    assert "Commands:" in run.stdout
    assert not [name for name in run.stderr.split() if name.startswith(heavy)]


@pytest.mark.parametrize("name", sorted(places()))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(name, "--help") == 0
    assert f"Usage: hacrl {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broker", "audit"])
def test_a_summary_is_the_first_sentence_of_the_help(name: str) -> None:
    place = places()[name]

    assert summary(place)
    assert load(place).help.startswith(summary(place))


def test_our_own_commands_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = metadata.EntryPoint("broker", "strange.module:broker", "hacrl.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: (strange,))

    assert places()["broker"].target == "hacrl_exchange.cli.broker:broker"


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("brokr") == 2
    assert "No such command 'brokr'" in capsys.readouterr().err


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--version") == 0
    assert capsys.readouterr().out == f"hacrl {metadata.version('hacrl-exchange')}\n"


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch", "agents"), ("torch.nn", "agents"), ("math_verify", "verifiers"), ("os", None)],
)
def test_the_extra_of_a_missing_package_is_known(module: str, extra: str | None) -> None:
    assert extra_of(module, distribution="hacrl-exchange") == extra


def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "made_up_plugin.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_up_plugin", raising=False)
    place = CommandPlace("made-up", "made_up_plugin:made_up", "hacrl-exchange")
    monkeypatch.setattr("hacrl_exchange.cli.app.places", lambda: {"made-up": place})


def test_a_plugin_without_its_packages_says_which_extra_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plugin(tmp_path, monkeypatch, "raise ModuleNotFoundError('No module', name='torch')\n")

    assert _run("made-up") == 1
    assert capsys.readouterr().err == (
        "hacrl made-up needs torch, which is not installed: pip install 'hacrl-exchange[agents]'\n"
    )


def test_ctrl_c_in_a_command_ends_with_130_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plugin(tmp_path, monkeypatch, "def made_up() -> None:\n    raise KeyboardInterrupt\n")

    assert _run("made-up") == 130
    assert capsys.readouterr().err == ""


def test_a_bug_in_a_command_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plugin(tmp_path, monkeypatch, "def made_up() -> None:\n    raise ZeroDivisionError\n")
    with pytest.raises(ZeroDivisionError):
        application()(["made-up"], prog_name="hacrl")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("90s", 90.0), ("10min", 600.0), ("1.5h", 5400.0), ("2 d", 172800.0)],
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text, "--x") == seconds
    assert seconds_of(duration_text(seconds), "--x") == seconds


@pytest.mark.parametrize("text", ["5", "", "s", "-1s", "5 weeks", "1e3s"])
def test_a_duration_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a duration; give a number and a unit"):
        seconds_of(text, "--x")


@pytest.mark.parametrize("text", ["0s", "0.0h", ".1ms", "366d", "9999999999999999999999h"])
def test_a_duration_is_above_zero_and_at_most_a_year(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not between 1ms and 365d"):
        seconds_of(text, "--x")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "99999999999999999999"),
        ("--min-members", "99999999999"),
        ("--retained-steps", "99999999999"),
        ("--publish-timeout", "0s"),
        ("--item-timeout", "-1s"),
    ],
)
def test_a_number_out_of_range_names_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = ("pool", "create", "p", "--prompts", "s", "--verifier", "math", "--prompts-per-step", "1")

    assert _run(*pool, option, value) == 2
    assert option in capsys.readouterr().err


# --- prompt files ----------------------------------------------------------------------------------


def test_a_line_is_a_prompt_with_its_private_reference() -> None:
    lines = [
        b'{"id": "a", "prompt": "1 + 1?", "reference": 2, "source": "sums"}\n',
        b"\n",
        b'{"id": 7, "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}\n',
    ]

    assert list(read_prompts(lines, where="f")) == [
        PromptEntry(Prompt("a", (Message("user", "1 + 1?"),), "sums"), "2"),
        PromptEntry(Prompt("7", (Message("system", ""), Message("user", "Hi"))), "null"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "the line is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"\xff\xfe", "the line is not UTF-8"),
        (
            b'{"id": "x", "prompt": "\\ud800"}',
            "a text has half of a surrogate pair, which is no character",
        ),
        (
            b'{"id": "x", "prompt": "", "reference": {"\\udfff": 1}}',
            "a text has half of a surrogate pair, which is no character",
        ),
        (
            b'{"id": "x", "prompt": "", "reference": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "the line is nested too deeply",
        ),
        (b"[1]", "a prompt is a JSON object"),
        (b'{"prompt": "x"}', '"id" must be a text of 1 to 128 bytes'),
        (b'{"id": "x"}', 'give either "prompt" or "messages"'),
        (b'{"id": "x", "prompt": "x", "messages": []}', 'give either "prompt" or "messages"'),
        (b'{"id": "x", "prompt": 5}', '"prompt" must be a text'),
        (b'{"id": "x", "messages": []}', '"messages" must be a list of at least one {"role", "content"}'),
        (b'{"id": "x", "messages": [{"role": "user"}]}', 'a message has exactly "role" and "content"'),
        (
            b'{"id": "x", "messages": [{"role": "", "content": "x"}]}',
            '"role" and "content" of a message must be texts, the role not empty',
        ),
        (
            b'{"id": "x", "prompt": "x", "answer": 1}',
            "the key 'answer' is unknown; the keys are id, messages, prompt, reference, source",
        ),
        (b'{"id": "first", "prompt": "x"}', "the id 'first' is taken by line 1"),
        (b'{"id": "x", "prompt": "x", "source": 1}', '"source" must be a text'),
    ],
)
def test_a_refused_line_is_named(line: bytes, problem: str) -> None:
    with pytest.raises(InvalidPromptSetError) as refused:
        list(read_prompts([b'{"id": "first", "prompt": "x"}\n', line], where="sums.jsonl"))

    assert str(refused.value) == f"sums.jsonl, line 2: {problem}; nothing was stored."


def test_a_file_without_prompts_is_refused() -> None:
    with pytest.raises(InvalidPromptSetError, match=r"^f holds no prompt; nothing was stored\.$"):
        list(read_prompts([b"\n"], where="f"))
