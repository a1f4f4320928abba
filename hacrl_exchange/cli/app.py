"""The top of the command line: loads one command when it runs, and turns failures into one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from hacrl_exchange.cli.catalog import CommandPlace, extra_of, places, summary
from hacrl_exchange.errors import ExchangeError

_FAILED = 1
_INTERRUPTED = 130


class Commands(TyperGroup):
    """Lists commands by their summaries and loads the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return list(places())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command as help shows it; its code stays unloaded."""
        place = places().get(cmd_name)
        return None if place is None else TyperCommand(cmd_name, short_help=summary(place))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is to run, loaded."""
        place = places().get(args[0])
        if place is None:
            return super().resolve_command(ctx, args)
        return place.name, load(place), args[1:]

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. Expected failures become a sentence on stderr and an exit code."""
        name = f"hacrl {ctx.invoked_subcommand or ' '.join(ctx._protected_args[:1])}"
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output is gone. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_FAILED) from None
        except (ExchangeError, OSError) as error:
            typer.echo(f"{name}: {_sentence(error)}", err=True)
            raise typer.Exit(_FAILED) from None
        except ModuleNotFoundError as error:
            sentence = _missing(name, error, places().get(name.partition(" ")[2]))
            if sentence is None:
                raise
            typer.echo(sentence, err=True)
            raise typer.Exit(_FAILED) from None


def load(place: CommandPlace) -> Any:
    """Imports a command.

    Raises:
        ModuleNotFoundError: something it needs is not installed.
    """
    found = getattr(importlib.import_module(place.module), place.attribute)
    app = found
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(place.name)(cast("Callable[..., None]", found))
    command = get_command(app)
    command.name = place.name
    return command


def _sentence(error: Exception) -> str:
    """What happened, without Python's error numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return str(error)


def _missing(name: str, error: ModuleNotFoundError, place: CommandPlace | None) -> str | None:
    """A sentence on a package that is not installed; None if its absence is a bug and not a choice."""
    module = error.name or ""
    distribution = place.distribution if place is not None else ""
    extra = extra_of(module, distribution=distribution)
    if extra is not None:
        install = f"{distribution or 'hacrl-exchange'}[{extra}]"
        return f"{name} needs {module}, which is not installed: pip install '{install}'"
    if place is not None and place.distribution and place.distribution != "hacrl-exchange":
        return f"{name} cannot be loaded: {error}. It comes with {place.distribution}; reinstall that."
    return None


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hacrl {version('hacrl-exchange')}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    """Strangers' models learn from each other's verified rollouts.

    Start with `hacrl demo`, or run an exchange of your own, each line in a terminal of its own:

    \b
      hacrl broker
      hacrl prompts add sums sums.jsonl
      hacrl pool create sums --prompts sums --verifier exact_match --prompts-per-step 16
      hacrl agent --pool sums --name mine --model PATH
    """


def application() -> Any:
    """The whole command line as one click command."""
    app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    app.callback()(_top)
    return get_command(app)


def run() -> None:
    """Parses `sys.argv`, runs, exits."""
    # gRPC's C core writes lines of its own about what we tell in a sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    application()(prog_name="hacrl")
