# The engine image for machines without a GPU: docker build -f deploy/docker/engine-cpu.Dockerfile -t multiattempt-engine:cpu .
#
# x86-64 only, as torch's CPU wheel is locked for it. There is no compiler in it: configurations for CPUs run vLLM
# eagerly and AdamW in torch. What would compile at first use (enforce_eager = false, offload_optimizer) needs the other
# image. TORCH_INDEX is where torch's CPU build comes from; empty: from what pip is configured with.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${PYTHON_IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/engine && python -m venv /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
WORKDIR /source
COPY deploy/docker/locks/build.txt deploy/docker/locks/torch-cpu.txt deploy/docker/locks/engine-cpu.txt locks/
RUN /opt/build/bin/pip install --no-deps --require-hashes -r locks/build.txt \
 && /opt/engine/bin/pip install --no-deps --require-hashes -r locks/build.txt \
 && /opt/engine/bin/pip install --no-deps --require-hashes ${TORCH_INDEX:+--index-url} ${TORCH_INDEX} -r locks/torch-cpu.txt
RUN /opt/engine/bin/pip install --no-deps --require-hashes --no-build-isolation -r locks/engine-cpu.txt \
 && find /opt/engine -type d \( -name tests -o -name test \) -path '*/site-packages/*/*' -prune -exec rm -r {} +
COPY pyproject.toml README.md ./
COPY services services
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/engine/bin/pip install --no-deps --no-index /wheels/*.whl && /opt/engine/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="multiattempt engine, CPU" \
      org.opencontainers.image.description="Rollout (vLLM) and learner (DeepSpeed) without a GPU" \
      org.opencontainers.image.licenses="Apache-2.0"
# vLLM's CPU kernels link against libnuma; slim images lack it.
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* \
 && python -m pip uninstall --quiet --yes pip setuptools wheel \
 && useradd --system --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin engine \
 && install -d -o 10001 -g 10001 /runs /models /cache
COPY --from=build /opt/engine /opt/engine
ENV PATH=/opt/engine/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/cache XDG_CACHE_HOME=/cache \
    HF_HOME=/models/huggingface VLLM_CACHE_ROOT=/cache/vllm TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton TORCH_EXTENSIONS_DIR=/cache/torch_extensions MPLCONFIGDIR=/cache/matplotlib \
    DS_ACCELERATOR=cpu \
    MULTIATTEMPT_RUN__DIR=/runs MULTIATTEMPT_MODEL__CACHE_DIR=/models/prepared \
    HEALTH_URL=http://127.0.0.1:8100/readyz
USER 10001:10001
WORKDIR /work
VOLUME ["/runs", "/models", "/cache"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=15m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=8)"]
ENTRYPOINT ["multiattempt"]
CMD ["--help"]
