"""`hacrl broker`: runs the exchange."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hacrl_exchange.cli.options import Folder


class LogLevel(StrEnum):
    """How much a broker tells on stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def broker(
    folder: Folder = Path("hacrl-data"),
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="HOST:PORT", help="Where to serve. Port 0 takes a free one."),
    ] = "127.0.0.1:7447",
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=0, metavar="N", help="Local worker processes that run verifiers. 0: none."
        ),
    ] = 1,
    slots: Annotated[
        int,
        typer.Option("--slots", min=1, metavar="N", help="Rollouts a worker judges at the same time."),
    ] = 1,
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            "--verifier",
            metavar="NAME",
            help="A verifier for the local workers, by name or as package.module:attribute. Repeatable; "
            "without it they run every installed one.",
        ),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", help="How much to tell on stderr.")
    ] = LogLevel.WARNING,
) -> None:
    """Run a broker: one process, one folder.

    Agents and operators connect to the address, pools and rollouts live in the folder. Ctrl-C or SIGTERM
    stops it cleanly; after a crash the same command goes on where it stopped, with nothing lost that was
    acknowledged. It serves its own machine only: others come in through an SSH tunnel.

    \b
      hacrl broker
      hacrl broker --folder /srv/exchange --listen 127.0.0.1:9000 --workers 2 --verifier math
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # The server brings grpc and the log: not for `--help`.
    from hacrl_exchange.broker.server import ServeOptions, serve

    def announce(target: str) -> None:
        typer.echo(f"Broker serves at {target}, data in {folder}. Ctrl-C stops it.")

    serve(
        ServeOptions(
            folder=folder,
            listen=listen,
            workers=workers,
            slots=slots,
            verifiers=tuple(verifier or ()),
            on_ready=announce,
        )
    )
