"""`hacrl worker`. Only typer is imported at the top: every other command pays for this module too."""

from __future__ import annotations

from typing import Annotated

import typer


def worker(
    broker: Annotated[
        str,
        typer.Option(
            envvar="HACRL_BROKER", help="Address of the broker: HOST:PORT, or unix:PATH.", metavar="TARGET"
        ),
    ] = "localhost:7447",
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            help="A verifier to offer, by registered name or as package.module:attribute. Repeat it for "
            "several. Default: every registered one that loads.",
            metavar="NAME",
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(help="How many items to verify at once, each in its own process.", min=1, max=256)
    ] = 1,
    identity: Annotated[
        str, typer.Option(help="Name for the broker's logs. Default: host name and process id.")
    ] = "",
    memory_mib: Annotated[
        int, typer.Option(help="Address space that one verifier process may use, in MiB.", min=256)
    ] = 2048,
    once: Annotated[
        bool, typer.Option("--once", help="Stop when nothing is left to verify, instead of waiting for more.")
    ] = False,
    until_stdin_closes: Annotated[
        bool, typer.Option("--until-stdin-closes", help="Also stop when standard input closes.")
    ] = False,
) -> None:
    """Runs verifiers for a broker: leases rollouts, judges them in killable processes, reports verdicts.

    Ctrl-C and SIGTERM finish what is in hand and stop. The key of a worker that a broker spawned comes in
    the environment variable HACRL_WORKER_KEY.
    """
    from hacrl_verifiers._program import WorkerSettings, run_worker

    settings = WorkerSettings(
        broker=broker,
        verifiers=tuple(verifier or ()),
        slots=slots,
        identity=identity,
        memory_bytes=memory_mib << 20,
        once=once,
        until_stdin_closes=until_stdin_closes,
    )
    raise typer.Exit(run_worker(settings))
