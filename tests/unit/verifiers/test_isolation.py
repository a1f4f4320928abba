"""Whatever a verifier does costs its own item and nothing else. Every case runs in real children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hacrl_exchange.types import Prompt, Scored, Unscored, UnscoredKind, VerdictReason
from hacrl_verifiers.isolation import IsolationError, Job, Pool, Responses
from hacrl_verifiers.results import Judgement

Judge = Callable[..., list[Judgement]]

TIMEOUT = Unscored(UnscoredKind.TIMEOUT, VerdictReason.ITEM_DEADLINE)
CRASHED = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.CRASHED)
RAISED = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.RAISED)
BAD_RESULT = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.BAD_RESULT)
UNAVAILABLE = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.VERIFIER_UNAVAILABLE)
GOOD = Scored(1.0)
DEADLINE = 0.3

HOSTILE = {
    "spin": TIMEOUT,
    "hang in c": TIMEOUT,
    "ignore signals": TIMEOUT,
    "stop": TIMEOUT,
    "run a program": TIMEOUT,
    "exit": CRASHED,
    "kill itself": CRASHED,
    "kill its group": CRASHED,
    "kill the zygote": CRASHED,
    "alarm and wait": CRASHED,
    "segfault": CRASHED,
    "much memory": CRASHED,
    "close descriptors": CRASHED,
    "leave processes": CRASHED,
    "noise": CRASHED,
    "system exit": RAISED,
    "keyboard interrupt": RAISED,
    "recurse": RAISED,
    "much text": RAISED,
    "unshowable": RAISED,
    "alarm and go": GOOD,
    "much output": GOOD,
    "fork and return": GOOD,
    "lie": GOOD,
}


@pytest.mark.parametrize(
    "deed",
    [
        pytest.param(deed, marks=pytest.mark.slow if verdict == TIMEOUT else ())
        for deed, verdict in HOSTILE.items()
    ],
)
def test_a_hostile_item_costs_itself_alone(judge: Judge, deed: str) -> None:
    texts = [*["ok"] * 20, deed, *["ok"] * 20]
    deadline = DEADLINE if HOSTILE[deed] == TIMEOUT else 10.0

    verdicts = [judgement.verdict for judgement in judge("hostile", texts, deadline=deadline)]

    assert verdicts == [*[GOOD] * 20, HOSTILE[deed], *[GOOD] * 20]


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["spin", "exit", "system exit", "kill itself"])
def test_a_batch_that_fails_runs_again_item_by_item(judge: Judge, deed: str) -> None:
    texts = ["ok", "none", deed, "ok"]

    verdicts = [judgement.verdict for judgement in judge("hostile_batch", texts, deadline=DEADLINE)]

    not_applicable = Unscored(UnscoredKind.NOT_APPLICABLE, VerdictReason.NOT_APPLICABLE)
    assert verdicts == [GOOD, not_applicable, HOSTILE[deed], GOOD]


@pytest.mark.slow
def test_several_hostile_items_in_one_job_are_each_found(judge: Judge) -> None:
    texts = ["ok", "exit", "ok", "spin", "system exit", "ok", "kill itself", "spin"]

    verdicts = [judgement.verdict for judgement in judge("hostile", texts, deadline=DEADLINE)]

    assert verdicts == [GOOD, CRASHED, GOOD, TIMEOUT, RAISED, GOOD, CRASHED, TIMEOUT]


@pytest.mark.slow
def test_a_hang_takes_its_deadline_and_little_more(judge: Judge) -> None:
    judge("hostile", ["ok"])
    started = time.monotonic()

    judge("hostile", ["ok", "spin", "ok"], deadline=0.5)

    assert 0.5 <= time.monotonic() - started < 1.0


def test_orphans_in_sessions_of_their_own_are_killed(
    judge: Judge, await_death: Callable[[int], bool]
) -> None:
    pids = Path(os.environ["SAMPLE_PIDS"])
    pids.unlink(missing_ok=True)

    assert judge("hostile", ["leave processes"])[0].verdict == CRASHED

    left = [int(line) for line in pids.read_text().split()]
    assert left
    assert all(await_death(pid) for pid in left)


def test_a_child_that_dies_between_jobs_costs_nothing(judge: Judge, pool: Pool) -> None:
    judge("equal", ["a"], reference='"a"')
    pid = pool.slots[0].child_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    assert judge("equal", ["a", "b"], reference='"a"') == [Judgement(GOOD), Judgement(Scored(0.0))]


def test_slots_do_not_disturb_each_other(pool: Pool) -> None:
    def job(text: str) -> Job:
        return Job("hostile", "{}", DEADLINE, (Responses(Prompt("p", ()), "null", (text,)),))

    assert pool.slots[1].run(job("ok"))[0].verdict == GOOD
    bystander = pool.slots[1].child_pid
    assert pool.slots[0].run(job("exit"))[0].verdict == CRASHED

    assert pool.slots[1].run(job("ok"))[0].verdict == GOOD
    assert pool.slots[1].child_pid == bystander


@pytest.mark.slow
def test_an_item_that_kills_the_zygote_costs_itself_alone_in_all_slots(pool: Pool) -> None:
    def job(*texts: str) -> Job:
        return Job("hostile", "{}", DEADLINE, (Responses(Prompt("p", ()), "null", texts),))

    jobs = [job("ok", "kill the zygote", "ok", "spin"), job("ok", "spin", "kill the zygote", "ok")]
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda slot, job: slot.run(job), pool.slots, jobs))

    verdicts = [[judgement.verdict for judgement in judgements] for judgements in results]
    assert verdicts == [[GOOD, CRASHED, GOOD, TIMEOUT], [GOOD, TIMEOUT, CRASHED, GOOD]]


def test_children_do_not_see_our_secrets(judge: Judge) -> None:
    assert os.environ["HACRL_WORKER_KEY"] == "secret"

    judgements = judge("environment", ["PATH", "HACRL_WORKER_KEY"])

    assert judgements == [Judgement(GOOD), Judgement(Scored(0.0))]


def test_an_item_cannot_change_the_reference_of_the_next(judge: Judge) -> None:
    assert judge("spoils", ["a"] * 10, reference='{"answer": ["4"]}') == [Judgement(GOOD)] * 10


def test_an_item_holds_prompt_and_token_ids(judge: Judge) -> None:
    judgements = judge("sees", ["a", "b"], tokens=[[1, 2], [3]])

    assert [judgement.verdict for judgement in judgements] == [
        Scored(1.0, {"tokens": 3.0, "messages": 1.0}),
        Scored(1.0, {"tokens": 3.0, "messages": 1.0}),
    ]


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        ("0.25", Scored(0.25)),
        ("1", Scored(1.0)),
        ("True", Scored(1.0)),
        ("False", Scored(0.0)),
        ("None", Unscored(UnscoredKind.NOT_APPLICABLE, VerdictReason.NOT_APPLICABLE)),
        ("{'score': 0.5, 'format': 1}", Scored(0.5, {"format": 1.0})),
        ("nan", BAD_RESULT),
        ("1e999", BAD_RESULT),
        ("10**400", BAD_RESULT),
        ("'0.5'", BAD_RESULT),
        ("[0.5]", BAD_RESULT),
        ("1j", BAD_RESULT),
        ("{'format': 1.0}", BAD_RESULT),
        ("{'score': 1.0, 'format': 'x'}", BAD_RESULT),
        ("{'score': 1.0, 7: 1.0}", BAD_RESULT),
        ("{'score': 1.0, 'n' * 65: 1.0}", BAD_RESULT),
        ("{'score': 1.0} | many", BAD_RESULT),
        ("1 / 0", RAISED),
    ],
)
def test_what_a_verifier_returns_decides_the_outcome(judge: Judge, result: str, verdict: object) -> None:
    assert judge("returns", ["x"], reference=f'"{result}"')[0].verdict == verdict


def test_a_failure_has_a_detail_for_operators(judge: Judge) -> None:
    raised = judge("returns", ["x"], reference='"1 / 0"')[0]
    much = judge("hostile", ["much text"])[0]

    assert raised.detail == "ZeroDivisionError: division by zero (<string>:1)"
    assert len(much.detail.encode()) <= 2048


def test_a_batch_verifier_is_set_up_once_and_judges_in_order(judge: Judge) -> None:
    texts = ["yes", "yes maybe", "", "no yes no maybe"]

    judgements = judge("known_words", texts, config='{"words": ["yes"]}')

    not_applicable = Unscored(UnscoredKind.NOT_APPLICABLE, VerdictReason.NOT_APPLICABLE)
    assert [one.verdict for one in judgements] == [Scored(1.0), Scored(0.5), not_applicable, Scored(0.25)]


def test_a_batch_of_the_wrong_length_runs_again_item_by_item(judge: Judge) -> None:
    assert judge("short_batch", ["a", "b", "c"]) == [Judgement(GOOD)] * 3


@pytest.mark.parametrize(
    ("verifier", "config", "detail"),
    [
        ("same_length", '{"x": 1}', "same_length has no setting 'x'. It has: tolerance."),
        ("same_length", '{"tolerance": "2"}', 'same_length wants tolerance as int, not "2".'),
        ("same_length", "[]", "The configuration for same_length must be a JSON object, not list."),
        ("bad_setup", "{}", "RuntimeError: the model file is missing (sample_verifiers.py:"),
        ("dying_setup", "{}", "dying_setup could not be prepared: its process died or took too long."),
    ],
)
def test_a_verifier_that_cannot_be_prepared_is_unavailable(
    judge: Judge, verifier: str, config: str, detail: str
) -> None:
    judgements = judge(verifier, ["a", "b"], config=config)

    assert [judgement.verdict for judgement in judgements] == [UNAVAILABLE] * 2
    assert judgements[0].detail.startswith(detail)


def test_odd_texts_arrive_whole(judge: Judge) -> None:
    text = "\x00\U0001f9ee e\u0301 " * 100_000

    assert judge("same_length", ["", text], reference='""') == [Judgement(GOOD), Judgement(Scored(0.0))]


def test_a_closed_pool_says_so(sample_specs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pool = Pool(sample_specs[:1])
    pool.close()

    with pytest.raises(IsolationError, match=r"The pool is closed\."):
        pool.slots[0].run(Job("equal", "{}", 1.0, (Responses(Prompt("p", ()), "null", ("a",)),)))


def test_what_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    with Pool(["sample_verifiers:equal", "sample_verifiers:DEEDS", "no.such:thing", "nobody"]) as pool:
        assert [offered.name for offered in pool.offered] == ["equal"]
        assert (pool.offered[0].version, pool.offered[0].full_score) == ("3", 2.0)
        assert dict(pool.failures) == {
            "sample_verifiers:DEEDS": "sample_verifiers:DEEDS is a dict, not a verifier. "
            "Decorate it with @verifier.",
            "no.such:thing": "no.such:thing does not import: ModuleNotFoundError: No module named 'no'",
            "nobody": "No verifier is registered as 'nobody'. Registered: boxed, exact_match, math, "
            "reasoning_gym. An unregistered one is named package.module:attribute.",
        }


_SUPERVISOR = """
import sys, time
from hacrl_verifiers.isolation import Job, Pool, Responses
from hacrl_exchange.types import Prompt
pool = Pool(["sample_verifiers:hostile"])
slot = pool.slots[0]
slot.run(Job("hostile", "{}", 60.0, (Responses(Prompt("p", ()), "null", ("ok",)),)))
print(pool.zygote_pid, slot.child_pid, flush=True)
slot.run(Job("hostile", "{}", 600.0, (Responses(Prompt("p", ()), "null", (sys.argv[1],)),)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "zygote"])
@pytest.mark.parametrize("deed", ["spin", "hang in c"])
def test_nothing_outlives_a_killed_supervisor(
    victim: str, deed: str, await_death: Callable[[int], bool]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, deed], stdout=subprocess.PIPE, text=True, env=environment
    )
    with supervisor:
        assert supervisor.stdout is not None
        zygote, child = map(int, supervisor.stdout.readline().split())
        if victim == "zygote":
            os.kill(zygote, signal.SIGKILL)
            assert await_death(child)
        supervisor.kill()

    assert await_death(zygote)
    assert await_death(child)
