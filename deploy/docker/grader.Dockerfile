# The math grader alone: docker build -f deploy/docker/grader.Dockerfile -t multiattempt-grader .
#                        docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 multiattempt-grader [--workers 4]
# Then open http://localhost:8000/. GRADER_API_KEY (or GRADER_API_KEY_FILE) in its environment locks it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${PYTHON_IMAGE}

FROM ${BUILD_IMAGE} AS build
RUN python -m venv /opt/grader
ENV PATH=/opt/grader/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY deploy/docker/locks/build.txt deploy/docker/locks/grader.txt locks/
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-deps --require-hashes -r locks/build.txt \
 && pip install --no-deps --require-hashes -r locks/grader.txt
COPY pyproject.toml README.md ./
COPY services services
# Compiled by pip, since nothing can be written later; pip itself has done its work.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && pip install --no-deps --no-index /wheels/*.whl \
 && find /opt/grader -type d -name tests -path '*/sympy/*' -prune -exec rm -r {} + \
 && pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="multiattempt grader" \
      org.opencontainers.image.description="Is this answer mathematically equal to that one? Over HTTP." \
      org.opencontainers.image.licenses="Apache-2.0"
RUN python -m pip uninstall --quiet --yes pip setuptools wheel \
 && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin grader
COPY --from=build /opt/grader /opt/grader
ENV PATH=/opt/grader/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["multiattempt", "serve", "grader", "--host", "0.0.0.0"]
