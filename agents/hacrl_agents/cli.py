"""The agents' commands: `hacrl agent` and `hacrl demo`. torch is imported when one runs, not before."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hacrl_agents import cli_options as options
from hacrl_agents.errors import AgentError
from hacrl_agents.hacpo_config import PAPER, HacpoConfig
from hacrl_agents.settings import TrainerSettings
from hacrl_exchange.errors import ExchangeError

_INTERRUPTED = 130


def agent(
    model: options.Model,
    name: options.Name,
    pool: options.Pool,
    broker: options.Broker = "localhost:7447",
    steps: options.Steps = 0,
    seed: options.Seed = 0,
    objective: options.Objective = "hacpo",
    alpha: options.Alpha = 1.0,
    delta: options.Delta = 0.2,
    delta_step: options.DeltaStep = 0.025,
    own_clip: options.OwnClip = None,
    over_limit: options.OverLimit = "skip",
    length_norm: options.LengthNorm = "own",
    on_degraded: options.OnDegraded = "own",
    allow_sampler_logprobs: options.AllowSamplerLogprobs = False,
    max_tokens: options.MaxTokens = 1024,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    sample_batch: options.SampleBatch = 512,
    lr: options.Lr = 1e-6,
    beta2: options.Beta2 = 0.999,
    warmup_steps: options.WarmupSteps = 0,
    minibatch_prompts: options.MinibatchPrompts = 64,
    micro_batch: options.MicroBatch = 64,
    out: options.Out = None,
    checkpoint_every: options.CheckpointEvery = 1,
    journal: options.Journal = None,
    eval_file: options.EvalFile = None,
    eval_scorer: options.EvalScorer = "hacrl_agents.evaluation:exact_match",
    eval_every: options.EvalEvery = 0,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Train a model in a pool, together with the models of others.

    Every step this agent answers the pool's prompts, publishes its answers, gets those of the others with
    their verdicts, and learns from all. Stopped in any way, the same command goes on from its last
    checkpoint.
    """
    with _failing_in_one_sentence("hacrl agent"):
        settings = TrainerSettings(
            objective=objective,
            hacpo=_hacpo(alpha=alpha, delta=delta, delta_step=delta_step, own_clip=own_clip),
            seed=seed,
            steps=steps,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            sample_batch=sample_batch,
            minibatch_prompts=minibatch_prompts,
            micro_batch=micro_batch,
            learning_rate=lr,
            betas=(0.9, beta2),
            warmup_steps=warmup_steps,
            over_limit=over_limit,
            length_norm=length_norm,
            allow_sampler_logprobs=allow_sampler_logprobs,
            on_degraded=on_degraded,
            checkpoint_every=checkpoint_every,
        )
        # torch and transformers take seconds to import: `hacrl --help` must not wait for them.
        from hacrl_agents.running import AgentOptions, run_agent

        chosen = AgentOptions(
            broker=broker,
            pool=pool,
            name=name,
            model=model,
            out=out if out is not None else Path("runs") / pool / name,
            settings=settings,
            journal=journal,
            device=device,
            threads=threads,
            eval_file=eval_file,
            eval_scorer=eval_scorer,
            eval_every=eval_every,
        )
        run_agent(chosen, console=Console())


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Steps that the agents train.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same accuracies.")] = 0,
    objective: Annotated[
        str,
        typer.Option(
            help="What the two agents learn by: hacpo; success_only: of the other only what went well; "
            "gspo: own rollouts alone."
        ),
    ] = "hacpo",
    out: Annotated[
        Path, typer.Option(help="Folder for report.json, learning.png and everything else.")
    ] = Path("runs/demo"),
) -> None:
    """Show two different small models learning from each other through a real broker.

    Starts a broker, a worker and two agents (a Qwen3 and a Llama of other size and tokenizer) as processes of
    their own, and beside them, as a control, the same two training alone. Ends with the held-out accuracies
    before and after. Some three minutes on two cores.
    """
    with _failing_in_one_sentence("hacrl demo"):
        from hacrl_agents.demo.command import run_demo
        from hacrl_agents.demo.settings import DemoSettings

        run_demo(
            settings=DemoSettings(objective=objective, steps=steps, seed=seed), out=out, console=Console()
        )


def _hacpo(*, alpha: float, delta: float, delta_step: float, own_clip: float | None) -> HacpoConfig:
    return HacpoConfig(
        alpha=alpha,
        cross_delta=delta,
        cross_step=delta_step,
        self_clip_low=PAPER.self_clip_low if own_clip is None else own_clip,
        self_clip_high=PAPER.self_clip_high if own_clip is None else own_clip,
    )


@contextmanager
def _failing_in_one_sentence(command: str) -> Iterator[None]:
    """Turns expected failures into a sentence and exit code 1, and SIGTERM into what Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (AgentError, ExchangeError, OSError) as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"{command}: stopped; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
