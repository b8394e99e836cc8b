# The math grader alone: docker build -f deploy/docker/grader.Dockerfile -t multiattempt-grader .
#                        docker run --read-only --tmpfs /tmp -p 8000:8000 multiattempt-grader [--workers 4]
# Then open http://localhost:8000/. GRADER_API_KEY in its environment locks it.

FROM python:3.11-slim AS build
RUN python -m venv /opt/grader
ENV PATH=/opt/grader/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY requirements/grader.txt requirements/grader.txt
RUN pip install --no-deps -r requirements/grader.txt
COPY pyproject.toml README.md ./
COPY services services
# Compiled by pip, since nothing can be written later; pip itself has done its work.
RUN pip install --no-deps . && find /opt/grader -type d -name tests -path '*/sympy/*' -prune -exec rm -r {} + \
 && pip uninstall --yes setuptools pip

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin grader
COPY --from=build /opt/grader /opt/grader
ENV PATH=/opt/grader/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["multiattempt", "serve", "grader", "--host", "0.0.0.0"]
