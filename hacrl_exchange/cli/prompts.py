"""Store prompt sets and list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hacrl_exchange.cli.options import DEFAULT_BROKER, Broker, Json

if TYPE_CHECKING:
    from hacrl_exchange.types import PromptEntry

prompts = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@prompts.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new set: a-z, 0-9 and '-'.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, UTF-8.")],
    broker: Broker = DEFAULT_BROKER,
) -> None:
    """Store a prompt set from a file of JSON lines, all or nothing.

    A line is an object with "id", either "prompt" (a text) or "messages" (a list of {"role", "content"}),
    and optionally "reference" (any JSON; agents never see it) and "source" (a text). A set can't be changed:
    a new version gets a new name.

    \b
      {"id": "1", "prompt": "What is 2 + 2?", "reference": "4", "source": "sums"}
      {"id": "2", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "reference": "7"}

    \b
      hacrl prompts add sums sums.jsonl
    """
    from hacrl_exchange.client import AdminClient

    entries = _read_with_progress(file)
    with AdminClient(broker) as admin:
        stored = admin.create_prompt_set(name, entries)
    typer.echo(
        f"Prompt set {stored.name}: {stored.prompt_count:,} prompts, version {stored.digest.hex()[:12]}."
    )


@prompts.command("list")
def list_sets(broker: Broker = DEFAULT_BROKER, json: Json = False) -> None:
    """List the prompt sets of a broker.

    \b
      hacrl prompts list
    """
    from rich.console import Console

    from hacrl_exchange.cli.views import number_table, print_json
    from hacrl_exchange.client import AdminClient

    with AdminClient(broker) as admin:
        found = admin.prompt_sets()
    if json:
        sets = [{"name": one.name, "prompts": one.prompt_count, "digest": one.digest.hex()} for one in found]
        print_json({"prompt_sets": sets})
    elif not found:
        typer.echo("No prompt sets yet. `hacrl prompts add` stores one.")
    else:
        table = number_table("prompt set", "prompts", "version")
        for one in found:
            table.add_row(one.name, f"{one.prompt_count:,}", one.digest.hex()[:12])
        Console().print(table)


def _read_with_progress(file: Path) -> list[PromptEntry]:
    """Reads the file, with a bar on stderr where a person may watch."""
    from rich.console import Console
    from rich.progress import wrap_file

    from hacrl_exchange.cli.prompt_file import read_prompts

    console = Console(stderr=True)
    with (
        file.open("rb") as raw,
        wrap_file(
            raw,
            file.stat().st_size,
            description=f"reading {file.name}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as lines,
    ):
        return list(read_prompts(lines, where=str(file)))
