"""The exchange: types, client SDK, broker and command line.

The names below are the SDK. They are loaded on first use, so importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hacrl_exchange.client import (
        AdminClient,
        Agent,
        Exchange,
        JointBatch,
        PublishReport,
        Step,
        WorkerClient,
        connect,
    )
    from hacrl_exchange.errors import ExchangeError
    from hacrl_exchange.types import (
        FinishReason,
        Group,
        LogprobOrigin,
        Message,
        ModelSpec,
        PolicyVersion,
        Prompt,
        Receipt,
        Rollout,
        SamplingParameters,
        Scored,
        Unscored,
        UnscoredKind,
        VerifiedGroup,
    )

__all__ = [
    "AdminClient",
    "Agent",
    "Exchange",
    "ExchangeError",
    "FinishReason",
    "Group",
    "JointBatch",
    "LogprobOrigin",
    "Message",
    "ModelSpec",
    "PolicyVersion",
    "Prompt",
    "PublishReport",
    "Receipt",
    "Rollout",
    "SamplingParameters",
    "Scored",
    "Step",
    "Unscored",
    "UnscoredKind",
    "VerifiedGroup",
    "WorkerClient",
    "connect",
]

_HOMES = ("hacrl_exchange.types", "hacrl_exchange.errors", "hacrl_exchange.client")


def __getattr__(name: str) -> object:
    if name in __all__:
        # The cheap modules first: a type must not load gRPC.
        for home in _HOMES:
            module = importlib.import_module(home)
            if hasattr(module, name):
                value: object = getattr(module, name)
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
