"""The grader's image on a real Docker engine: small, non-root, read-only, healthy, and it grades."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = "multiattempt-grader:test"
MAX_SIZE_BYTES = 400 * 10**6
BUILD_TIMEOUT_S = 900
HEALTHY_WITHIN_S = 90

ASK = """
import json, sys, urllib.request
url, headers = "http://127.0.0.1:8000" + sys.argv[1], {"Content-Type": "application/json"}
request = urllib.request.Request(url, sys.argv[2].encode(), headers)
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


def docker(*arguments: str, timeout_s: float = 60) -> str:
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"docker {arguments[0]}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def has_engine() -> bool:
    """Whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0


pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(BUILD_TIMEOUT_S + HEALTHY_WITHIN_S + 60),
    pytest.mark.skipif(not has_engine(), reason="no Docker engine answers here"),
]


@pytest.fixture(scope="module")
def image() -> str:
    """The image, built."""
    dockerfile = "deploy/docker/grader.Dockerfile"
    docker("build", "--network", "host", "-f", dockerfile, "-t", IMAGE, ".", timeout_s=BUILD_TIMEOUT_S)
    return IMAGE


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    """A container of it that can write nothing but /tmp and may do nothing that root may."""
    locked_down = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    container = docker("run", "--detach", *locked_down, image, "--workers", "2")
    yield container
    docker("rm", "--force", container)


def ask(container: str, path: str, body: object) -> Any:
    return json.loads(docker("exec", container, "python", "-c", ASK, path, json.dumps(body)))


def test_it_is_small(image: str) -> None:
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) < MAX_SIZE_BYTES


def test_it_becomes_healthy_and_grades(container: str) -> None:
    end = time.monotonic() + HEALTHY_WITHIN_S
    while docker("inspect", "--format", "{{.State.Health.Status}}", container) != "healthy":
        assert time.monotonic() < end, docker("logs", container)
        time.sleep(0.5)
    body = {"response": "\\boxed{(x+1)^2}", "gold": "x^2+2x+1"}
    assert ask(container, "/v1/grade", body)["verdict"] == "correct"
    assert "<msup>" in ask(container, "/v1/explain", body)["answer_mathml"]


def test_nothing_in_it_is_root_or_writable(container: str) -> None:
    assert docker("exec", container, "id", "-u") == "10001"
    writes = "import pathlib, services; pathlib.Path(services.__file__).with_name('x').write_text('x')"
    denied = subprocess.run(
        ["docker", "exec", container, "python", "-c", writes], capture_output=True, timeout=60, check=False
    )
    assert denied.returncode != 0 and b"Read-only file system" in denied.stderr


def test_it_holds_no_torch_and_no_pip(container: str) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'pip', 'gmpy2', 'vllm') if u.find_spec(n)])"
    assert docker("exec", container, "python", "-c", code) == "[]"


def test_it_stops_in_time_when_told(container: str) -> None:
    docker("stop", "--time", "15", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
