"""The operator's commands against a real broker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hacrl_exchange.cli.app import application
from hacrl_exchange.client import OfferedVerifier, WorkerClient, connect
from hacrl_exchange.testing import BrokerProcess, RunningBroker, running_broker
from hacrl_exchange.types import FinishReason, Group, PolicyVersion, Rollout

pytestmark = pytest.mark.slow

Hacrl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningBroker]:
    """A broker without workers that every command finds by HACRL_BROKER."""
    with running_broker() as running:
        monkeypatch.setenv("HACRL_BROKER", running.target)
        monkeypatch.setenv("COLUMNS", "120")
        yield running


@pytest.fixture
def hacrl(capsys: pytest.CaptureFixture[str]) -> Hacrl:
    """Runs a command; its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            application()([*arguments], prog_name="hacrl")
        out, err = capsys.readouterr()
        assert ended.value.code is None or isinstance(ended.value.code, int)
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A file of 20 prompts."""
    file = tmp_path / "sums.jsonl"
    lines = [{"id": str(n), "prompt": f"{n} + 1?", "reference": str(n + 1)} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _create(hacrl: Hacrl, *more: str) -> tuple[int, str, str]:
    return hacrl(
        *("pool", "create", "sums", "--prompts", "sums", "--verifier", "exact_match"),
        *("--prompts-per-step", "4", "--group-size", "2", "--min-members", "1", *more),
    )


def test_a_prompt_set_is_stored_once_and_listed(broker: RunningBroker, hacrl: Hacrl, sums: Path) -> None:
    first = hacrl("prompts", "add", "sums", str(sums))
    code, out, err = hacrl("prompts", "add", "sums", str(sums))

    assert first == (code, out, err)
    assert (code, err) == (0, "")
    assert out.startswith("Prompt set sums: 20 prompts, version ")
    code, out, _ = hacrl("prompts", "list", "--json")
    (stored,) = json.loads(out)["prompt_sets"]
    assert (stored["name"], stored["prompts"]) == ("sums", 20)


def test_a_refused_prompt_file_names_its_line(broker: RunningBroker, hacrl: Hacrl, sums: Path) -> None:
    sums.write_text(sums.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")

    assert hacrl("prompts", "add", "sums", str(sums)) == (
        1,
        "",
        f'hacrl prompts: {sums}, line 21: "id" must be a text of 1 to 128 bytes; nothing was stored.\n',
    )
    assert hacrl("prompts", "list")[1] == "No prompt sets yet. `hacrl prompts add` stores one.\n"


def test_a_file_that_is_not_there_gives_a_sentence(hacrl: Hacrl, tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"

    assert hacrl("prompts", "add", "x", str(missing)) == (
        1,
        "",
        f"hacrl prompts: No such file or directory: {missing}\n",
    )


def test_a_pool_is_created_shown_and_listed(broker: RunningBroker, hacrl: Hacrl, sums: Path) -> None:
    assert hacrl("pool", "list")[1] == "No pools yet. `hacrl pool create` makes one.\n"
    hacrl("prompts", "add", "sums", str(sums))
    code, out, err = _create(hacrl, "--max-steps", "5", "--publish-timeout", "90s", "--reveal", "open")

    assert code == 0
    assert err == (
        "No worker that is connected now offers the verifier 'exact_match' (there is none); until one does, "
        "rollouts wait and end unscored.\n"
    )
    assert out == (
        "Pool sums: 4 prompts of sums a step, 2 rollouts each, judged by exact_match, at least 1 members, "
        "5 steps\n"
    )
    shown = json.loads(hacrl("pool", "show", "sums", "--json")[1])
    assert (shown["publish_timeout_seconds"], shown["reveal"], shown["max_steps"]) == (90.0, "open", 5)
    assert shown["counts"] == {"accepted": 0, "scored": 0, "unscored": 0, "pending": 0}
    (listed,) = json.loads(hacrl("pool", "list", "--json")[1])["pools"]
    assert listed == {key: shown[key] for key in listed}


def test_a_pool_is_warned_about_only_where_no_worker_offers_its_verifier(
    broker: RunningBroker, hacrl: Hacrl, sums: Path
) -> None:
    hacrl("prompts", "add", "sums", str(sums))
    with WorkerClient(broker.target) as worker:
        worker.register("w", offered=[OfferedVerifier("boxed", "1")])
        _, _, err = _create(hacrl)
        assert "'exact_match' (they offer boxed)" in err
        worker.register("v", offered=[OfferedVerifier("exact_match", "1")])
        assert _create(hacrl)[2] == ""


def test_a_pool_shows_its_members_and_counts_while_a_step_is_open(
    broker: RunningBroker, hacrl: Hacrl, sums: Path
) -> None:
    hacrl("prompts", "add", "sums", str(sums))
    _create(hacrl)
    with connect(broker.target) as exchange, exchange.join("sums", agent="lab-a") as agent:
        step = next(agent.steps(timeout_seconds=10))
        version = PolicyVersion(agent.session, 0)
        rollouts = tuple(Rollout(str(n), 1, -0.5, FinishReason.STOP) for n in range(2))
        agent.publish([Group(step.prompts[0].prompt_id, rollouts, "a" * 64, version, version)])
        code, out, err = hacrl("pool", "show", "sums")

    assert (code, err) == (0, "")
    assert "rollouts: 2 accepted = 0 scored + 0 unscored + 2 pending" in out
    assert "lab-a" in out
    assert "ACTIVE" in out


def test_other_settings_under_a_pools_name_are_refused(
    broker: RunningBroker, hacrl: Hacrl, sums: Path
) -> None:
    hacrl("prompts", "add", "sums", str(sums))
    _create(hacrl)

    assert _create(hacrl, "--seed", "1") == (
        1,
        "",
        "hacrl pool: Pool sums exists with another spec; pools are immutable, choose another name.\n",
    )


def test_a_pool_that_is_not_there_gives_a_sentence(broker: RunningBroker, hacrl: Hacrl) -> None:
    assert hacrl("pool", "show", "none") == (
        1,
        "",
        "hacrl pool: There is no pool none; `hacrl pool list` names those that exist.\n",
    )


def test_the_audit_of_a_running_broker_holds(broker: RunningBroker, hacrl: Hacrl, sums: Path) -> None:
    hacrl("prompts", "add", "sums", str(sums))
    code, out, _ = hacrl("audit", "--folder", str(broker.folder), "--json")

    report = json.loads(out)
    assert (code, report["ok"], report["records"], report["accepted"]) == (0, True, 1, 0)
    code, out, _ = hacrl("audit", "--folder", str(broker.folder))
    assert code == 0
    assert "The audit holds." in out


def test_an_audit_that_misses_a_receipt_fails(
    broker: RunningBroker, hacrl: Hacrl, sums: Path, tmp_path: Path
) -> None:
    hacrl("prompts", "add", "sums", str(sums))
    _create(hacrl)
    receipt = {"pool": "sums", "step": 1, "prompt_id": "0", "agent": "a", "session": 1, "rollouts": 2}
    journal = tmp_path / "a.jsonl"
    journal.write_text(json.dumps({**receipt, "digest": "00" * 32}) + "\n", encoding="utf-8")
    code, out, _ = hacrl("audit", "--folder", str(broker.folder), "--journal", str(journal), "--json")

    report = json.loads(out)
    assert (code, report["ok"], report["receipts"], report["receipts_found"]) == (1, False, 1, 0)
    _, out, _ = hacrl("audit", "--folder", str(broker.folder), "--journal", str(journal))
    assert "The audit found 1 problem:" in out


def test_an_audit_of_no_folder_gives_a_sentence(hacrl: Hacrl, tmp_path: Path) -> None:
    code, out, err = hacrl("audit", "--folder", str(tmp_path / "none"))

    assert (code, out) == (1, "")
    assert err.startswith("hacrl audit: ")
    assert err.count("\n") == 1


# --- hacrl broker as a process ---------------------------------------------------------------------


def _broker(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hacrl_exchange.cli", "broker", "--workers", "0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_broker_says_where_it_serves_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with _broker("--folder", str(tmp_path / "data"), "--listen", "127.0.0.1:0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=30)

    assert line.startswith("Broker serves at 127.0.0.1:")
    assert line.endswith(f", data in {tmp_path / 'data'}. Ctrl-C stops it.\n")
    assert (process.returncode, err) == (0, "")


def test_a_data_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    with BrokerProcess(folder, workers=0):
        modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}

    assert {path.name: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen", "{target}"], "Cannot listen at {target}: the port is in use or not allowed."),
        (["--folder", "{folder}"], "The data folder {folder} is in use by process {pid}."),
        (["--listen", "0.0.0.0:1"], "0.0.0.0 is not a loopback address."),
        (["--listen", "nowhere"], "The address must be HOST:PORT, e.g. 127.0.0.1:7447; it is 'nowhere'."),
        (["--folder", "{file}"], "{file} is a file, not a folder; choose another with --folder."),
        (["--folder", "/proc/data"], "/proc/data cannot be made: No such file or directory. Choose another"),
        (
            ["--verifier", "nonsense"],
            "No verifier 'nonsense' is installed here; there are boxed, exact_match,",
        ),
        (
            ["--verifier", "no_such_package.judge:sums"],
            "The verifier 'no_such_package.judge:sums' cannot be loaded: no package 'no_such_package' is",
        ),
    ],
    ids=[
        "port in use",
        "folder in use",
        "open to the world",
        "no port",
        "not a folder",
        "impossible folder",
        "unknown verifier",
        "unknown package",
    ],
)
def test_a_broker_that_cannot_start_says_so_in_a_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    with BrokerProcess(tmp_path / "first", workers=0) as first:
        names = {"target": first.target, "folder": first.folder, "pid": first.pid, "file": file}
        chosen = [argument.format(**names) for argument in arguments]
        others = ["--folder", str(tmp_path / "second"), "--listen", "127.0.0.1:0"]
        # The last of an option given twice counts.
        with _broker(*others, *chosen) as process:
            out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"hacrl broker: {sentence.format(**names)}")
    assert err.count("\n") == 1
