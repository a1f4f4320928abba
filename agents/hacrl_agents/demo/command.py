"""`hacrl demo`, from an empty folder to a report. What happens, in order; the parts are beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from hacrl_agents.demo.live import Board
from hacrl_agents.demo.models import DESIGNS
from hacrl_agents.demo.picture import draw_learning_curves
from hacrl_agents.demo.processes import DemoError, Kept, choose_port, exchange_command
from hacrl_agents.demo.report import build_report, print_summary
from hacrl_agents.demo.runs import Run
from hacrl_agents.demo.settings import CONTROL_POOL_PREFIX, HELD_OUT_PROMPTS, POOL, PROMPT_SET, DemoSettings
from hacrl_agents.demo.task import Problem, make_split, write_prompts
from hacrl_exchange.client import AdminClient, connect
from hacrl_exchange.types import (
    Lockstep,
    Message,
    PoolSpec,
    Prompt,
    PromptEntry,
    VerificationPlan,
    VerifierUse,
)

_MARKER = "demo-run"
_START_SECONDS = 60.0
_LOOK_SECONDS = 0.5


def run_demo(*, settings: DemoSettings, out: Path, console: Console) -> None:
    """Runs the whole demo and writes `out/report.json` and `out/learning.png`.

    Raises:
        DemoError: a process failed for good, or the folder holds something else.
        ExchangeError: the broker refuses something, or does not come up.
        OSError: the folder cannot be written.
    """
    started = time.monotonic()
    _clear(out)
    console.print(
        f"Objective {settings.objective}, {settings.steps} steps of {settings.prompts_per_step} prompts x "
        f"{settings.group_size} rollouts, seed {settings.seed}. Everything goes to {out}/.",
        highlight=False,
    )
    split = make_split(settings.seed, training=settings.training_prompts, held_out=HELD_OUT_PROMPTS)
    held_out = write_prompts(split.held_out, out / "held_out.jsonl")
    write_prompts(split.training, out / "prompts.jsonl")
    _warm_start(settings, out, console)

    port = choose_port()
    target = f"127.0.0.1:{port}"
    broker = Kept("broker", _broker_command(out, target), log=out / "logs" / "broker.log")
    runs: list[Run] = []
    try:
        with connect(target, timeout_seconds=_START_SECONDS):
            pass
        _make_pools(settings, target, split.training)
        runs = [
            *(_start(design.name, POOL, settings, out, target, held_out) for design in DESIGNS),
            *(
                _start(design.name, f"{CONTROL_POOL_PREFIX}{design.name}", settings, out, target, held_out)
                for design in DESIGNS
            ),
        ]
        console.print(_invitation(settings, out, target), highlight=False, soft_wrap=True)
        _watch(broker, runs, Board(console, settings=settings), out)
    finally:
        for run in runs:
            run.process.stop()
        broker.stop()
    seconds = time.monotonic() - started
    report = build_report(settings, runs, audit=_audit(out, runs), seconds=seconds)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_learning_curves(runs, settings=settings, path=out / "learning.png")
    print_summary(report, runs, settings=settings, out=out, console=console)


def _clear(out: Path) -> None:
    """Empties the folder of an earlier demo; never anybody else's."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise DemoError(f"{out} is not empty and not of an earlier demo: choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("hacrl demo wrote this folder and may delete it.\n", encoding="utf-8")


def _warm_start(settings: DemoSettings, out: Path, console: Console) -> None:
    """Both agents imitate worked answers, each mostly of its own half of the numbers."""
    from rich.progress import Progress

    kept = [
        Kept(
            f"the warm start of {design.name}",
            [
                *("-m", "hacrl_agents.demo.prepare", design.name, str(out / "models" / design.name)),
            ],
            log=out / "logs" / f"warm-start-{design.name}.log",
        )
        for design in DESIGNS
    ]
    try:
        with Progress(console=console) as bars:
            tasks = [
                bars.add_task(f"warm start of {design.name}", total=design.iterations) for design in DESIGNS
            ]
            while any([process.is_running() for process in kept]):
                for task, design in zip(tasks, DESIGNS, strict=True):
                    bars.update(task, completed=_warmed(out / "logs" / f"warm-start-{design.name}.log"))
                time.sleep(_LOOK_SECONDS)
            for task, design in zip(tasks, DESIGNS, strict=True):
                bars.update(task, completed=design.iterations)
    finally:
        for process in kept:
            process.stop()


def _warmed(log: Path) -> int:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    try:
        return int(json.loads(lines[-1])["iteration"]) if lines else 0
    except ValueError:
        return 0  # a line that is being written


def _broker_command(out: Path, target: str) -> list[str]:
    return exchange_command(
        "broker",
        *("--folder", str(out / "broker"), "--listen", target),
        *("--workers", "1", "--verifier", "reasoning_gym"),
    )


def _make_pools(settings: DemoSettings, target: str, problems: tuple[Problem, ...]) -> None:
    entries = [
        PromptEntry(
            Prompt(problem.prompt_id, (Message("user", problem.question),), problem.source),
            problem.entry_json,
        )
        for problem in problems
    ]
    with AdminClient(target) as admin:
        admin.create_prompt_set(PROMPT_SET, entries)
        admin.create_pool(POOL, _spec(settings, min_members=len(DESIGNS)))
        for design in DESIGNS:
            admin.create_pool(f"{CONTROL_POOL_PREFIX}{design.name}", _spec(settings, min_members=1))


def _spec(settings: DemoSettings, *, min_members: int) -> PoolSpec:
    return PoolSpec(
        prompt_set=PROMPT_SET,
        group_size=settings.group_size,
        plan=VerificationPlan((VerifierUse("reasoning_gym"),), success_threshold=settings.success_threshold),
        lockstep=Lockstep(
            prompts_per_step=settings.prompts_per_step,
            min_members=min_members,
            publish_timeout_seconds=settings.publish_timeout_seconds,
            verify_timeout_seconds=settings.verify_timeout_seconds,
            max_steps=settings.steps,
        ),
        seed=settings.seed,
    )


def _start(name: str, pool: str, settings: DemoSettings, out: Path, target: str, held_out: Path) -> Run:
    """One agent in one pool: the shared one, or its own, where it trains alone."""
    alone = pool != POOL
    label = pool if alone else name
    folder = out / "agents" / label
    objective = "gspo" if alone else settings.objective
    command = exchange_command(
        "agent",
        *("--broker", target, "--pool", pool, "--name", name),
        *(
            "--model",
            str(out / "models" / name),
            "--out",
            str(folder),
            "--journal",
            str(folder / "receipts.jsonl"),
        ),
        *("--eval-file", str(held_out), "--eval-scorer", "hacrl_agents.demo.task:score"),
        *("--eval-every", str(settings.eval_every)),
        *settings.agent_arguments(objective=objective),
    )
    process = Kept(label, command, log=out / "logs" / f"{label}.log")
    return Run(name=name, pool=pool, alone=alone, folder=folder, model=out / "models" / name, process=process)


def _invitation(settings: DemoSettings, out: Path, target: str) -> str:
    """The one command by which a third agent takes part."""
    arguments = " ".join(settings.agent_arguments(objective=settings.objective))
    model, folder = out / "models" / DESIGNS[1].name, out / "agents" / "third"
    return (
        f"A third agent can join from another terminal:\n  hacrl agent --broker {target} --pool {POOL} "
        f"--name third --model {model} --out {folder} {arguments}"
    )


def _watch(broker: Kept, runs: list[Run], board: Board, out: Path) -> None:
    """Shows where everybody stands until all are done; whoever is killed is started again.

    `processes.json` tells who is who, for those who want to kill one.
    """
    processes = [broker, *(run.process for run in runs)]
    told: dict[str, int] = {}
    with board.shown():
        running = True
        while running:
            broker.is_running()
            running = any([run.process.is_running() for run in runs])
            if told != (told := {process.name: process.pid for process in processes}):
                (out / "processes.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
            board.update(runs)
            time.sleep(_LOOK_SECONDS)


def _audit(out: Path, runs: list[Run]) -> dict[str, object]:
    """`hacrl audit` over the broker's folder and every agent's own journal."""
    journals = [argument for run in runs for argument in ("--journal", str(run.folder / "receipts.jsonl"))]
    command = [
        sys.executable,
        *exchange_command("audit", "--folder", str(out / "broker"), "--json", *journals),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise DemoError(f"The audit failed: {done.stderr.strip() or 'it said nothing'}")
    found: dict[str, object] = json.loads(done.stdout)
    return found
