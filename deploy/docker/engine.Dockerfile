# Rollout, learner, evaluation and `multiattempt prepare` on NVIDIA GPUs: one image, so that both ends of the weight
# transfer have the same vLLM, torch and NCCL. docker build -f deploy/docker/engine.Dockerfile -t multiattempt-engine .
#
# It stands on vLLM's own image, of the version that pyproject.toml pins, and adds what that lacks in a virtual
# environment above it. That image has gcc and nvcc, and they are needed at run time: Triton compiles its launchers,
# FlashInfer its kernels and DeepSpeed's optimiser on the host (learner.offload_optimizer) itself at first use, into
# /cache. Nothing else is built there.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${VLLM_IMAGE} AS build
RUN python3 -m venv --system-site-packages /opt/engine && python3 -m venv /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
WORKDIR /source
COPY deploy/docker/locks/build.txt deploy/docker/locks/engine-cuda.txt locks/
RUN /opt/build/bin/pip install --no-deps --require-hashes -r locks/build.txt \
 && /opt/engine/bin/pip install --no-deps --require-hashes -r locks/build.txt \
 && /opt/engine/bin/pip install --no-deps --require-hashes --no-build-isolation -r locks/engine-cuda.txt
COPY pyproject.toml README.md ./
COPY services services
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/engine/bin/pip install --no-deps --no-index /wheels/*.whl && /opt/engine/bin/pip uninstall --yes pip

FROM ${VLLM_IMAGE}
LABEL org.opencontainers.image.title="multiattempt engine" \
      org.opencontainers.image.description="Rollout (vLLM) and learner (DeepSpeed) for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin engine \
 && install -d -o 10001 -g 10001 /runs /models /cache
COPY --from=build /opt/engine /opt/engine
ENV PATH=/opt/engine/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/cache XDG_CACHE_HOME=/cache \
    HF_HOME=/models/huggingface VLLM_CACHE_ROOT=/cache/vllm TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton TORCH_EXTENSIONS_DIR=/cache/torch_extensions MPLCONFIGDIR=/cache/matplotlib \
    FLASHINFER_WORKSPACE_BASE=/cache CUDA_DEVICE_ORDER=PCI_BUS_ID \
    MULTIATTEMPT_RUN__DIR=/runs MULTIATTEMPT_MODEL__CACHE_DIR=/models/prepared \
    HEALTH_URL=http://127.0.0.1:8100/readyz
USER 10001:10001
WORKDIR /work
VOLUME ["/runs", "/models", "/cache"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=15m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=8)"]
ENTRYPOINT ["multiattempt"]
CMD ["--help"]
