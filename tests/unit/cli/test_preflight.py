"""Checks before the start that need no machine to fail on."""

from pathlib import Path

import pytest

from services.cli.preflight import available_memory_gb, check, check_memory
from services.contracts.config import ConfigError, RunConfig, load


def config(tmp_path: Path, *flags: str) -> RunConfig:
    base = ["--run.dir", str(tmp_path / "runs"), "--model.source", "arithmetic", "--data.digits", "1"]
    return load(None, [*base, "--data.heldout_size", "16", *flags], env={})


def machine(tmp_path: Path, *, available_kb: int, limit: str, used: int, cache: int) -> tuple[Path, Path]:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\n")
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    return tmp_path / "meminfo", cgroup


def test_a_good_configuration_passes(tmp_path: Path) -> None:
    check(config(tmp_path), resume=False)


def test_too_little_memory_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory: 2\.0 GB available, about 3\.\d GB are needed"):
        check_memory(config(tmp_path, "--rollout.device", "cpu"), available_gb=2.0)


def test_each_replica_and_a_larger_model_need_more(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2**30)
    large = ("--model.source", "pretrained", "--model.path", str(tmp_path), "--rollout.device", "cpu")
    check_memory(config(tmp_path, *large), available_gb=11)
    with pytest.raises(ConfigError, match=r"12\.5 GB are needed"):
        check_memory(config(tmp_path, *large, "--rollout.replicas", "2"), available_gb=11)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    meminfo, cgroup = machine(tmp_path, available_kb=16 << 20, limit=str(4 << 30), used=3 << 30, cache=1 << 30)
    assert available_memory_gb(meminfo, cgroup) == 2.0


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    meminfo, cgroup = machine(tmp_path, available_kb=16 << 20, limit="max", used=3 << 30, cache=0)
    assert available_memory_gb(meminfo, cgroup) == 16.0
    assert available_memory_gb(meminfo, tmp_path / "none") == 16.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--grader.port", "45001", "--rollout.port", "45001"), "rollout.port: 45001 is also grader.port"),
        (("--rollout.port", "65535", "--rollout.replicas", "2"), "65536 is no port"),
    ],
)
def test_ports_that_collide_or_run_out_are_found(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(config(tmp_path, *flags), resume=False)


def test_the_port_of_a_grader_elsewhere_is_not_bound_here(tmp_path: Path) -> None:
    check(config(tmp_path, "--grader.url", "http://elsewhere:1", "--grader.port", "1"), resume=False)
