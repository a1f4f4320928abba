"""The options of `hacrl agent`, one annotated type each. Import-light: no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_OBJECTIVE = "Objective"
_SAMPLING = "Sampling"
_OPTIMIZER = "Optimizer"
_OUTPUT = "Output"

Model = Annotated[str, typer.Option(help="Folder written by save_pretrained, or a hub name.")]
Name = Annotated[str, typer.Option(help="The agent's name in the pool; yours from the first join on.")]
Pool = Annotated[str, typer.Option(help="The pool to join.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints and metrics.jsonl; a run goes on from the checkpoint it finds there. "
        "Default: runs/POOL/NAME.",
        rich_help_panel=_OUTPUT,
    ),
]
Broker = Annotated[str, typer.Option(envvar="HACRL_BROKER", help="Address of the broker, host:port.")]
Steps = Annotated[
    int, typer.Option(min=0, help="Steps to train, counted over restarts. 0: until the pool ends.")
]
Seed = Annotated[int, typer.Option(help="Seed of the sampler.")]
Objective = Annotated[
    str,
    typer.Option(
        help="hacpo; gspo: own samples alone; success_only: of the others only what went well.",
        rich_help_panel=_OBJECTIVE,
    ),
]
Alpha = Annotated[
    float, typer.Option(help="Exponent of the foreign importance weight.", rich_help_panel=_OBJECTIVE)
]
Delta = Annotated[
    float,
    typer.Option(
        help="Foreign ratios are clipped below at 1 - delta at the first update of a step.",
        rich_help_panel=_OBJECTIVE,
    ),
]
DeltaStep = Annotated[
    float,
    typer.Option(
        help="Rise of that bound per update, for 4 updates a step; scaled for more or fewer.",
        rich_help_panel=_OBJECTIVE,
    ),
]
OwnClip = Annotated[
    float | None,
    typer.Option(
        help="Own ratios are clipped at 1 - c and 1 + c. For short answers about 0.25 / tokens, or more. "
        "Default: the paper's 3e-4 and 4e-4, for about 700 tokens.",
        rich_help_panel=_OBJECTIVE,
    ),
]
OverLimit = Annotated[
    str, typer.Option(help="A peer's answer over --max-tokens: skip or truncate.", rich_help_panel=_OBJECTIVE)
]
LengthNorm = Annotated[
    str,
    typer.Option(
        help="own: mean log-probs over each one's own tokens; source: both over the source's.",
        rich_help_panel=_OBJECTIVE,
    ),
]
OnDegraded = Annotated[
    str,
    typer.Option(help="A step without quorum: train on own samples, or skip.", rich_help_panel=_OBJECTIVE),
]
AllowSamplerLogprobs = Annotated[
    bool,
    typer.Option(
        "--allow-sampler-logprobs",
        help="With hacpo, learn from peers whose log-probs are not their trainer's, too.",
        rich_help_panel=_OBJECTIVE,
    ),
]
MaxTokens = Annotated[
    int, typer.Option(min=1, help="Limit of an answer, end token included.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float, typer.Option(help="1 is on policy; peers see other values.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float, typer.Option(help="1 is on policy; peers see other values.", rich_help_panel=_SAMPLING)
]
SampleBatch = Annotated[int, typer.Option(min=1, help="Answers decoded together.", rich_help_panel=_SAMPLING)]
Lr = Annotated[float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=_OPTIMIZER)]
Beta2 = Annotated[float, typer.Option(help="Second beta of AdamW.", rich_help_panel=_OPTIMIZER)]
WarmupSteps = Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=_OPTIMIZER)]
MinibatchPrompts = Annotated[
    int, typer.Option(min=1, help="Prompts of one agent per update.", rich_help_panel=_OPTIMIZER)
]
MicroBatch = Annotated[
    int,
    typer.Option(min=1, help="Answers per forward pass: memory, not results.", rich_help_panel=_OPTIMIZER),
]
CheckpointEvery = Annotated[
    int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_OUTPUT)
]
Journal = Annotated[
    Path | None,
    typer.Option(
        help="File that keeps every receipt, for `hacrl audit`. Default: none.", rich_help_panel=_OUTPUT
    ),
]
EvalFile = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines of held-out prompts with references: accuracy before and after.",
        rich_help_panel=_OUTPUT,
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        min=0,
        help="Trained steps between evaluations; 0: only before and after.",
        rich_help_panel=_OUTPUT,
    ),
]
EvalScorer = Annotated[
    str, typer.Option(help="module:function(text, reference) -> score of 0 to 1.", rich_help_panel=_OUTPUT)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(min=1, help="torch threads; 1 lets several agents share a machine.")]
