"""The broker as a process: sockets, services, local workers and a clean end.

`serve` blocks until Ctrl-C or SIGTERM. Agents connect over TCP; the workers the broker spawns connect over
a unix socket in the data folder with a one-time key.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import ipaddress
import logging
import os
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from hacrl_exchange._pb import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    exchange_service_pb2,
    exchange_service_pb2_grpc,
    verification_service_pb2,
    verification_service_pb2_grpc,
)
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.interceptors import ErrorInterceptor, Identities
from hacrl_exchange.broker.limits import MIB, Limits
from hacrl_exchange.broker.local_workers import LocalWorkers, WorkerOptions
from hacrl_exchange.broker.services.admin import AdminService
from hacrl_exchange.broker.services.exchange import ExchangeService
from hacrl_exchange.broker.services.verification import VerificationService
from hacrl_exchange.errors import InvalidRequestError

_log = logging.getLogger(__name__)

_STOP_GRACE_SECONDS = 3.0
_GATE_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Checking runs outside the interpreter lock for the most part; the other cores are the log's and gRPC's."""
_GC_THRESHOLD = 20_000
_MAX_SOCKET_PATH = 100
"""The kernel allows 107 bytes."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to run a broker. `listen` is "host:port"; port 0 takes a free one. `workers` local worker
    processes with `slots` children each run `verifiers` (all built-ins if empty)."""

    folder: Path
    listen: str = "127.0.0.1:7447"
    workers: int = 1
    slots: int = 1
    verifiers: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    on_ready: Callable[[str], None] | None = None
    """Called once with "host:port" when the broker serves."""


def serve(options: ServeOptions) -> None:
    """Runs a broker until Ctrl-C or SIGTERM.

    Raises:
        DatabaseTooNewError, DatabaseInUseError, CorruptLogError: about the data folder.
        InvalidRequestError: the address is not loopback or malformed, or a verifier is not installed.
        OSError: the port is in use, or the folder cannot be made or written.
    """
    # The folder holds references that agents must never see: whatever is made in it is the user's alone.
    os.umask(0o077)
    # Requests come and go by the thousand, and hardly any of them is part of a cycle. What is imported by
    # now stays for good: the collector need not walk it again and again.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 50)
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running(options) as target:
        if options.on_ready is not None:
            options.on_ready(target)
        await stop.wait()
        _log.info("stopping")


@contextlib.asynccontextmanager
async def running(options: ServeOptions) -> AsyncIterator[str]:
    """A broker on the running event loop; yields its "host:port". Ends it on leaving."""
    host = _loopback_host(options.listen)
    _check_verifiers(options.verifiers)
    _private_folder(options.folder)
    broker = await Broker.open(options.folder, limits=options.limits)
    identities = Identities()
    with contextlib.ExitStack() as stack:
        gate_threads = stack.enter_context(ThreadPoolExecutor(_GATE_THREADS, thread_name_prefix="gate"))
        try:
            server, health = _server(broker, identities, gate_threads)
            port = _bind(server, options.listen)
            socket = stack.enter_context(_worker_socket(options.folder))
            server.add_insecure_port(f"unix:{socket}")
            socket.chmod(0o600)
            await server.start()
            workers = LocalWorkers(
                f"unix:{socket}",
                identities,
                options=WorkerOptions(options.workers, options.slots, options.verifiers),
                on_exit=broker.desk.local_worker_ended,
            )
            workers.start()
            try:
                _log.info("serving at %s:%d, data in %s", host, port, options.folder)
                yield f"{host}:{port}"
            finally:
                await health.enter_graceful_shutdown()
                await workers.stop()
                await broker.refuse()
                await server.stop(_STOP_GRACE_SECONDS)
        finally:
            await broker.stop()


def _server(
    broker: Broker, identities: Identities, gate_threads: ThreadPoolExecutor
) -> tuple[grpc.aio.Server, health_aio.HealthServicer]:
    limits = broker.limits
    server = grpc.aio.server(
        interceptors=(ErrorInterceptor(),),
        options=(
            ("grpc.max_receive_message_length", limits.max_message_size + MIB),
            ("grpc.max_send_message_length", limits.max_message_size + MIB),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ),
    )
    exchange_service_pb2_grpc.add_ExchangeServiceServicer_to_server(
        ExchangeService(broker, identities, gate_threads=gate_threads), server
    )
    verification_service_pb2_grpc.add_VerificationServiceServicer_to_server(
        VerificationService(broker, identities), server
    )
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(broker), server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [
        exchange_service_pb2.DESCRIPTOR.services_by_name["ExchangeService"].full_name,
        verification_service_pb2.DESCRIPTOR.services_by_name["VerificationService"].full_name,
        admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    ]
    reflection.enable_server_reflection(
        [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    return server, health


def _bind(server: grpc.aio.Server, listen: str) -> int:
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        port = 0
        cause: Exception | None = error
    else:
        cause = None
    if port == 0:
        raise OSError(
            f"Cannot listen at {listen}: the port is in use or not allowed. Choose another one."
        ) from cause
    return port


@contextlib.contextmanager
def _worker_socket(folder: Path) -> Iterator[Path]:
    """Where local workers connect: in the data folder, or in a temporary one if that path is too long."""
    socket = folder.resolve() / "worker.sock"
    if len(str(socket).encode()) <= _MAX_SOCKET_PATH:
        yield socket
        return
    with tempfile.TemporaryDirectory(prefix="hacrl-") as short:
        yield Path(short) / "worker.sock"


def _private_folder(folder: Path) -> None:
    """Makes the data folder, or takes one that is there, and closes it to others."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        # Who shares a folder that belongs to another user has decided on its mode there.
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
            folder.chmod(0o700)
    except FileExistsError as error:
        raise OSError(f"{folder} is a file, not a folder; choose another with --folder.") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be made: {error.strerror}. Choose another with --folder.") from error


def _check_verifiers(specs: tuple[str, ...]) -> None:
    """Refuses what no local worker could load, without importing any verifier into the broker."""
    installed = {point.name for point in entry_points(group="hacrl.verifiers")}
    for spec in specs:
        module, separator, attribute = spec.partition(":")
        package = module.partition(".")[0]
        if not separator and spec not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise InvalidRequestError(
                f"No verifier {spec!r} is installed here; there are {known}. "
                "One of your own is named package.module:attribute."
            )
        if separator and not (package and attribute and _is_importable(package)):
            raise InvalidRequestError(
                f"The verifier {spec!r} cannot be loaded: no package {package!r} is installed here."
            )


def _is_importable(package: str) -> bool:
    try:
        # A worker is run with `python -m`, so it finds what lies in the current folder too.
        return (
            importlib.util.find_spec(package) is not None
            or PathFinder.find_spec(package, [str(Path.cwd())]) is not None
        )
    except ValueError:  # a module without a spec, such as __main__
        return False


def _loopback_host(listen: str) -> str:
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise InvalidRequestError(f"The address must be HOST:PORT, e.g. 127.0.0.1:7447; it is {listen!r}.")
    name = host.strip("[]")
    try:
        loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InvalidRequestError(
            f"{host} is not a loopback address. This broker has no keys and no TLS yet, so it serves "
            "only its own machine: listen at 127.0.0.1 and let others in through an SSH tunnel."
        )
    return host
