"""The SDK: for agents (`connect`), for workers (`WorkerClient`) and for operators (`AdminClient`).

Synchronous, typed, on one gRPC channel. Nothing here knows the broker's inside.
"""

from hacrl_exchange.client.admin import AdminClient
from hacrl_exchange.client.agent import Agent
from hacrl_exchange.client.batch import JointBatch
from hacrl_exchange.client.exchange import Exchange, connect
from hacrl_exchange.client.publishing import PublishReport
from hacrl_exchange.client.step import Step
from hacrl_exchange.client.views import (
    MemberInfo,
    PoolInfo,
    PoolStatus,
    PromptSetInfo,
    ServerInfo,
    ServerLimits,
    WorkerInfo,
)
from hacrl_exchange.client.worker import (
    Lease,
    LeasedGroup,
    OfferedVerifier,
    VerdictReport,
    WorkerClient,
    WorkerRegistration,
)

__all__ = [
    "AdminClient",
    "Agent",
    "Exchange",
    "JointBatch",
    "Lease",
    "LeasedGroup",
    "MemberInfo",
    "OfferedVerifier",
    "PoolInfo",
    "PoolStatus",
    "PromptSetInfo",
    "PublishReport",
    "ServerInfo",
    "ServerLimits",
    "Step",
    "VerdictReport",
    "WorkerClient",
    "WorkerInfo",
    "WorkerRegistration",
    "connect",
]
