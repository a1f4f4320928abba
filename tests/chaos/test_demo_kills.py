"""The whole demo while its broker, its worker and an agent are killed again and again, each started anew.

Takes some minutes: `make chaos`. Its short form, in every CI run, is tests/integration/test_kills.py.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import children, kill, wait_until

STEPS = 16


def run_demo(out: Path, *, disturb: bool) -> dict[str, Any]:
    """Runs `hacrl demo`; with kills at random moments, the same ones each time."""
    command = [sys.executable, "-m", "hacrl_exchange.cli", "demo", "--steps", str(STEPS), "--out", str(out)]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if disturb:
            for number, victim in enumerate(["broker", "worker", "agent-a", "broker", "agent-b", "worker"]):
                wait_for_steps(out, 2 * (number + 1), demo)
                kill(process_id(out, victim))
        assert demo.wait(timeout=600) == 0
    finally:
        if demo.poll() is None:
            demo.terminate()
            demo.wait()
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def wait_for_steps(out: Path, steps: int, demo: subprocess.Popen[bytes]) -> None:
    """Blocks until the first agent has trained so many steps, and a random moment of the next one."""
    metrics = out / "agents" / "agent-a" / "metrics.jsonl"

    def reached() -> bool:
        assert demo.poll() is None, "the demo ended before its time"
        return metrics.exists() and len(metrics.read_text().splitlines()) >= steps

    wait_until(reached, seconds=300, what=f"step {steps}")
    moment = random.Random(steps).random()
    count = len(metrics.read_text())
    if moment > 0.5:  # half of the time a little later: when the other agent or the next step has moved on
        wait_until(
            lambda: len((out / "agents" / "agent-b" / "metrics.jsonl").read_text()) != count,
            seconds=60,
            what="progress of the other agent",
        )


def process_id(out: Path, name: str) -> int:
    """Who is who now."""
    told: dict[str, int] = json.loads((out / "processes.json").read_text())
    if name != "worker":
        return told[name]
    wait_until(lambda: bool(children(told["broker"])), seconds=30, what="a worker of the broker")
    return children(told["broker"])[0]


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_demo_with_kills_ends_like_one_without(tmp_path: Path) -> None:
    calm = run_demo(tmp_path / "calm", disturb=False)
    wild = run_demo(tmp_path / "wild", disturb=True)
    assert wild["audit_ok"], wild["problems"]
    assert wild["audit"] == calm["audit"]
    assert wild["receipts"]["given"] == wild["receipts"]["found"]
    assert sum(agent["restarts"] for agent in wild["agents"]) == 2
    for before, after in zip(calm["agents"], wild["agents"], strict=True):
        for figure in ("accuracy_before", "accuracy_after", "accuracy_alone", "peer_rollouts_used", "curve"):
            assert before[figure] == after[figure], figure
