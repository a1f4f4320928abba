"""Measure what an exchange does on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hacrl_exchange.cli.options import Json

bench = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@bench.callback()
def _group() -> None:
    # With a callback typer keeps `exchange` a command below; alone it would be `hacrl bench` itself.
    return


@bench.command("exchange")
def exchange(
    groups: Annotated[
        int, typer.Option("--groups", metavar="N", min=1, help="Groups of a phase, rounded to whole steps.")
    ] = 4096,
    step_prompts: Annotated[
        int, typer.Option("--step-prompts", metavar="N", min=1, max=4096, help="Prompts of a step.")
    ] = 128,
    quick: Annotated[bool, typer.Option("--quick", help="A short form for CI: 512 groups.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seeds the texts.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="FOLDER", help="Where the broker's data goes. Default: a temporary folder."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure publishing, verifying and consuming, alone and all at once, and what survives a kill.

    Broker, publisher, worker and consumer are processes of their own over loopback. Every group is different:
    8 rollouts of 1,000 tokens with text, ids of a vocabulary of 32,768 and f16 log-probs. Encoding, the
    broker's checks, leases, decoding and digests are on the clock; making the texts is not, nor is
    the garbage collector walking them. At the end the
    broker is killed, started again, and every receipt is looked for. Takes about a minute, 1 GB of memory and
    400 MB of disk. Exit code 1 if a receipt is missing.

    \b
      hacrl bench exchange
      hacrl bench exchange --quick --json
    """
    import tempfile

    from hacrl_exchange.cli.bench.conductor import Plan, conduct
    from hacrl_exchange.cli.bench.corpus import Shape
    from hacrl_exchange.cli.bench.figures import as_json, print_figures
    from hacrl_exchange.cli.bench.processes import BenchFailedError
    from hacrl_exchange.cli.bench.progress import bars

    wanted = 512 if quick else groups
    step_prompts = max(min(step_prompts, wanted), -(-wanted // 64))
    plan = Plan(
        groups=-(-wanted // step_prompts) * step_prompts, step_prompts=step_prompts, shape=Shape(), seed=seed
    )
    with tempfile.TemporaryDirectory(prefix="hacrl-bench-", dir=folder) as inside, bars() as show:
        try:
            figures, around = conduct(plan, folder=Path(inside), show=show)
        except BenchFailedError as error:
            typer.echo(f"hacrl bench: {error}", err=True)
            raise typer.Exit(1) from None
    if json:
        typer.echo(as_json(figures))
    else:
        print_figures(figures, around)
    if figures.recovered != figures.receipts or around.audit_problems:
        raise typer.Exit(1)
