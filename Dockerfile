# syntax=docker/dockerfile:1
# Two images: `--target broker` (slim, no torch) runs the broker with its local workers, `--target agent`
# a trainer. Both run as an unprivileged user; the broker keeps everything in /var/lib/hacrl.

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/hacrl
ENV PATH=/opt/hacrl/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hacrl_exchange hacrl_exchange
COPY agents agents
COPY verifiers verifiers
RUN pip install --constraint constraints.txt '.[verifiers]'

# An image of its own, so that the agents' gigabytes never enter the broker's.
FROM build AS build-agent
# Empty takes the CUDA build; give PyTorch's index of CPU builds for a far smaller image.
ARG TORCH_INDEX=
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt '.[agents]'

FROM python:3.11-slim AS runtime
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/hacrl hacrl
ENV PATH=/opt/hacrl/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /var/lib/hacrl
USER hacrl
ENTRYPOINT ["hacrl"]

FROM runtime AS agent
COPY --from=build-agent /opt/hacrl /opt/hacrl
ENV OMP_NUM_THREADS=1
ENTRYPOINT ["hacrl", "agent"]
CMD ["--help"]

# Last, so that it is what a plain `docker build .` makes.
FROM runtime AS broker
COPY --from=build /opt/hacrl /opt/hacrl
VOLUME /var/lib/hacrl
# Without keys the broker serves loopback alone, so the container shares the host's: run it with
#   docker run --network host -v hacrl:/var/lib/hacrl hacrl-exchange:broker
# The broker answers the standard gRPC health service.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["python", "-c", "\
import grpc; \
from grpc_health.v1 import health_pb2 as health, health_pb2_grpc as rpc; \
stub = rpc.HealthStub(grpc.insecure_channel('localhost:7447')); \
answer = stub.Check(health.HealthCheckRequest(), timeout=4); \
raise SystemExit(answer.status != health.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["hacrl", "broker"]
