"""Create pools and see where they stand."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hacrl_exchange.cli.options import (
    DEFAULT_BROKER,
    INT32_MAX,
    INT64_MAX,
    INT64_MIN,
    Broker,
    Json,
    seconds_of,
)

pool = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


class Reveal(StrEnum):
    """When an owner sees the groups of others."""

    GIVE_TO_GET = "give-to-get"
    OPEN = "open"


PoolName = Annotated[str, typer.Argument(metavar="NAME", help="The pool.")]


@pool.command("create")
def create(
    name: PoolName,
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="SET", help="Prompt set, stored with `hacrl prompts add`.")
    ],
    verifier: Annotated[
        str,
        typer.Option("--verifier", metavar="NAME", help="What judges rollouts: math, boxed, exact_match ..."),
    ],
    prompts_per_step: Annotated[
        int, typer.Option("--prompts-per-step", metavar="N", min=1, max=INT32_MAX, help="Prompts of a step.")
    ],
    broker: Broker = DEFAULT_BROKER,
    config_json: Annotated[
        str,
        typer.Option("--config-json", metavar="JSON", help="The verifier's configuration, a JSON object."),
    ] = "{}",
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size", metavar="G", min=1, max=INT32_MAX, help="Rollouts of an agent for a prompt."
        ),
    ] = 8,
    min_members: Annotated[
        int,
        typer.Option(
            "--min-members",
            metavar="N",
            min=1,
            max=INT32_MAX,
            help="Members that open the first step and make a quorum.",
        ),
    ] = 2,
    publish_timeout: Annotated[
        str,
        typer.Option("--publish-timeout", metavar="TIME", help="Time to publish, from a step's opening."),
    ] = "10min",
    verify_timeout: Annotated[
        str,
        typer.Option("--verify-timeout", metavar="TIME", help="Time to verify, from the end of publishing."),
    ] = "5min",
    item_timeout: Annotated[
        str,
        typer.Option("--item-timeout", metavar="TIME", help="Time to judge one rollout; then it is killed."),
    ] = "10s",
    max_attempts: Annotated[
        int,
        typer.Option(
            "--max-attempts", metavar="N", min=1, max=INT32_MAX, help="Workers that may fail on a group."
        ),
    ] = 3,
    success_threshold: Annotated[
        float,
        typer.Option("--success-threshold", metavar="SCORE", help="A rollout succeeds from this score on."),
    ] = 1.0,
    max_unscored_share: Annotated[
        float,
        typer.Option(
            "--max-unscored-share",
            metavar="SHARE",
            min=0,
            max=1,
            help="An agent with more unscored rollouts in a step has its groups withheld.",
        ),
    ] = 0.1,
    max_steps: Annotated[
        int,
        typer.Option(
            "--max-steps", metavar="N", min=0, max=INT64_MAX, help="The pool ends after this step. 0: never."
        ),
    ] = 0,
    max_open_steps: Annotated[
        int,
        typer.Option(
            "--max-open-steps", metavar="N", min=1, max=INT32_MAX, help="Steps that may be open at once."
        ),
    ] = 1,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", metavar="N", min=0, max=INT32_MAX, help="Longest response. 0: the broker's limit."
        ),
    ] = 0,
    reveal: Annotated[
        Reveal,
        typer.Option(
            "--reveal",
            help="Who sees a closed step's groups: owners who answered the same prompt, or everybody.",
        ),
    ] = Reveal.GIVE_TO_GET,
    retained_steps: Annotated[
        int,
        typer.Option(
            "--retained-steps",
            metavar="N",
            min=0,
            max=INT32_MAX,
            help="Closed steps kept for replay. 0: all.",
        ),
    ] = 0,
    capability_window: Annotated[
        int,
        typer.Option(
            "--capability-window", metavar="N", min=1, max=INT32_MAX, help="Steps that make up a capability."
        ),
    ] = 5,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", min=INT64_MIN, max=INT64_MAX, help="Seeds the order of prompts."),
    ] = 0,
) -> None:
    """Create a pool. It can't be changed later.

    The same command again finds the pool that exists; other settings under its name are refused. Times are a
    number and a unit: 500ms, 90s, 10min, 2h.

    \b
      hacrl pool create math --prompts dapo --verifier math --prompts-per-step 24
      hacrl pool create sums --prompts sums --verifier reasoning_gym --prompts-per-step 16 \\
          --group-size 4 --publish-timeout 90s --max-steps 200
    """
    from hacrl_exchange.cli.views import pool_line
    from hacrl_exchange.client import AdminClient
    from hacrl_exchange.types import Lockstep, PoolSpec, RevealRule, VerificationPlan, VerifierUse

    spec = PoolSpec(
        prompt_set=prompts,
        group_size=group_size,
        plan=VerificationPlan(
            verifiers=(VerifierUse(verifier, config_json),),
            success_threshold=success_threshold,
            item_timeout_seconds=seconds_of(item_timeout, "--item-timeout"),
            max_attempts=max_attempts,
            max_unscored_share=max_unscored_share,
        ),
        lockstep=Lockstep(
            prompts_per_step=prompts_per_step,
            min_members=min_members,
            publish_timeout_seconds=seconds_of(publish_timeout, "--publish-timeout"),
            verify_timeout_seconds=seconds_of(verify_timeout, "--verify-timeout"),
            max_open_steps=max_open_steps,
            max_steps=max_steps,
        ),
        seed=seed,
        max_tokens=max_tokens,
        reveal=RevealRule.OPEN if reveal is Reveal.OPEN else RevealRule.GIVE_TO_GET,
        retained_steps=retained_steps,
        capability_window=capability_window,
    )
    with AdminClient(broker) as admin:
        created = admin.create_pool(name, spec)
        offered = sorted({offer for worker in admin.workers() for offer in worker.verifiers})
    typer.echo(f"Pool {created.name}: {pool_line(created.spec)}")
    if verifier not in offered:
        others = f"they offer {', '.join(offered)}" if offered else "there is none"
        typer.echo(
            f"No worker that is connected now offers the verifier {verifier!r} ({others}); until one does, "
            "rollouts wait and end unscored.",
            err=True,
        )


@pool.command("show")
def show(name: PoolName, broker: Broker = DEFAULT_BROKER, json: Json = False) -> None:
    """Show where a pool stands: steps, members, capabilities, and that nothing got lost.

    \b
      hacrl pool show math
      hacrl pool show math --json
    """
    from hacrl_exchange.cli.views import pool_json, print_json, print_pool
    from hacrl_exchange.client import connect

    with connect(broker) as exchange:
        status = exchange.pool(name)
        members = exchange.members(name)
        closed = [step for step in range(1, status.last_step + 1) if step not in status.open_steps]
        # The envelopes alone: the roster is what is shown, and the bodies may be large.
        last = None
        if closed:
            last = exchange.replay(name, closed[-1], parts=("meta",), timeout_seconds=10)
    if json:
        print_json(pool_json(status, members, last=last))
    else:
        print_pool(status, members, last=last)


@pool.command("list")
def list_pools(broker: Broker = DEFAULT_BROKER, json: Json = False) -> None:
    """List the pools of a broker.

    \b
      hacrl pool list
    """
    from hacrl_exchange.cli.views import pool_summary_json, print_json, print_pools
    from hacrl_exchange.client import connect

    with connect(broker) as exchange:
        found = [exchange.pool(info.name) for info in exchange.pools()]
    if json:
        print_json({"pools": [pool_summary_json(status) for status in found]})
    else:
        print_pools(found)
