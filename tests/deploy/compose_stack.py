"""The compose stack on a real Docker engine: images, up, scale, kill, and what can be seen of it from outside."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE, GRADER = "multiattempt-engine:test", "multiattempt-grader:test"
FILES = ("-f", "docker-compose.yml", "-f", "deploy/compose.cpu.yml")
BUILD_TIMEOUT_S = 1500
TORCH_BASE = "multiattempt-build-base:test"
PYTHON = "python:3.11-slim-bookworm"


def has_engine() -> bool:
    """Whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0


def docker(*arguments: str, timeout_s: float = 120, env: Mapping[str, str] | None = None) -> str:
    """Run it at the root of the repository. Fails with what it said."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, "DOCKER_BUILDKIT": "0", **(env or {})},  # the classic builder: buildx may not be there
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def build(scratch: Path) -> None:
    """Both images of the CPU stack, out of this working tree."""
    arguments = ["--network", "host"]
    docker("build", *arguments, "-f", "deploy/docker/grader.Dockerfile", "-t", GRADER, ".", timeout_s=BUILD_TIMEOUT_S)
    if (wheel := _local_torch()) is not None:  # a machine that cannot reach torch's own index
        folder = scratch / "base"
        folder.mkdir()
        shutil.copy(wheel, folder)
        told = r'RUN printf "find-links = /opt/wheels\n" >> /etc/pip.conf'
        (folder / "Dockerfile").write_text(f"FROM {PYTHON}\nCOPY *.whl /opt/wheels/\n{told}\n", encoding="utf-8")
        docker("build", "-t", TORCH_BASE, str(folder), timeout_s=BUILD_TIMEOUT_S)
        arguments += ["--build-arg", f"BUILD_IMAGE={TORCH_BASE}", "--build-arg", "TORCH_INDEX="]
    docker(
        "build", *arguments, "-f", "deploy/docker/engine-cpu.Dockerfile", "-t", ENGINE, ".", timeout_s=BUILD_TIMEOUT_S
    )


def _local_torch() -> Path | None:
    """torch's CPU wheel in the folder that pip is told to look into, if it is."""
    folder = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere"))
    return next(iter(sorted(folder.glob("torch-2.13.0+cpu-cp311-*.whl"))), None) if folder.is_dir() else None


def until(what: str, probe: Callable[[], object], *, timeout_s: float, pause_s: float = 0.5) -> float:
    """Wait until `probe` returns something true; what it raises counts as false. Returns the seconds it took."""
    started = time.monotonic()
    last: object = None
    while time.monotonic() - started < timeout_s:
        with suppress(AssertionError, ValueError, KeyError):
            last = probe()
            if last:
                return time.monotonic() - started
        time.sleep(pause_s)
    raise AssertionError(f"not within {timeout_s:g} s: {what} (last: {last!r})")


class Stack:
    """One project of the CPU stack, with secrets and settings of its own. `say` is told each measurement."""

    def __init__(self, project: str, scratch: Path, *, settings: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._say, self._settings = say, scratch / "settings.yml"
        secrets = scratch / "secrets"
        secrets.mkdir()
        for name in ("redis_password", "control_token", "grader_api_key", "grafana_password"):
            (secrets / name).write_text(f"{name}-{os.urandom(8).hex()}", encoding="utf-8")
            (secrets / name).chmod(0o444)
        self.secrets = {path.name: path.read_text(encoding="utf-8") for path in secrets.iterdir()}
        engine = {"environment": dict(settings)}
        services = {name: engine for name in ("prepare", "rollout", "learner", "evaluation")}
        self._settings.write_text(json.dumps({"services": services}), encoding="utf-8")  # JSON is YAML
        self._env = {
            "COMPOSE_PROJECT_NAME": project,
            "ENGINE_IMAGE": ENGINE,
            "GRADER_IMAGE": GRADER,
            "REDIS_IMAGE": os.environ.get("REDIS_IMAGE", "redis:7"),
            "SECRETS": str(secrets),
            "GRADER_PORT": "0",
            "DATA": str(scratch),
        }

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """`docker compose` of this project."""
        return docker("compose", *FILES, "-f", str(self._settings), *arguments, timeout_s=timeout_s, env=self._env)

    def timed(self, what: str, act: Callable[[], object]) -> None:
        """Do it, and say how long it took."""
        started = time.monotonic()
        act()
        self._say(f"{what}: {time.monotonic() - started:.1f} s")

    def up(self, *arguments: str) -> None:
        """Without pulling or building anything; returns when the containers have been started."""
        self.compose("up", "--detach", "--pull", "never", "--no-build", *arguments, timeout_s=600)

    def containers(self, service: str) -> list[dict[str, str]]:
        """The service's containers as `docker compose ps` has them."""
        lines = self.compose("ps", "--all", "--format", "json", service).splitlines()
        return [json.loads(line) for line in lines if line]

    def healthy(self, service: str) -> int:
        """How many of its containers are."""
        return sum(container["Health"] == "healthy" for container in self.containers(service))

    def run(self, code: str, service: str = "learner") -> str:
        """Python in a running container; its standard output."""
        return self.compose("exec", "-T", service, "python", "-c", code)

    def step(self, service: str = "learner") -> int:
        """Policy updates written to the run's metrics, as a running container of `service` sees them."""
        code = "import glob; print(max([0, *(sum(1 for _ in open(p)) for p in glob.glob('/runs/*/metrics.jsonl'))]))"
        return int(self.run(code, service))

    def replicas(self, service: str = "learner") -> list[int]:
        """Versions of the replicas that the registry knows as ready."""
        code = (
            "import asyncio\n"
            "from pathlib import Path\n"
            "from services.contracts.config import load_resolved\n"
            "from services.contracts.registry import Registry\n"
            "from services.contracts.store import connect\n"
            "async def main():\n"
            "    config = load_resolved(Path('configs/demo.toml'))\n"
            "    redis = await connect(config.redis.url)\n"
            "    found = await Registry(redis, run=config.run.name).replicas()\n"
            "    print([r.version for r in found if r.state == 'ready'])\n"
            "    await redis.aclose()\n"
            "asyncio.run(main())\n"
        )
        versions: list[int] = json.loads(self.run(code, service))
        return versions

    def main_process(self, service: str) -> int:
        """Process id, on this machine, of what runs in the service's first container."""
        return int(docker("inspect", "--format", "{{.State.Pid}}", self.containers(service)[0]["ID"]))

    def logs(self) -> str:
        """Everything that every container said."""
        return self.compose("logs", "--no-color", "--no-log-prefix")

    def down(self, *, forget: bool) -> None:
        """Stop and remove the containers; `forget` the volumes too."""
        self.compose("--profile", "eval", "down", "--timeout", "60", *(["--volumes"] if forget else []))
