"""`python -m services.rollout` refuses a wrong configuration with one line and exit code 2, before it loads vLLM."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.contracts.config import load, to_toml_dict

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def refusal(config_path: Path, *flags: str) -> str:
    """The line that a replica ends with."""
    command = [sys.executable, "-m", "services.rollout", "--config", str(config_path), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    config = load(None, ["--run.dir", str(tmp_path), "--run.name", "x"], env={})
    config.run_dir.mkdir()
    path = config.run_dir / "config.json"
    path.write_text(json.dumps(to_toml_dict(config)))
    (tmp_path / "model").mkdir()
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(tmp_path / "model")}))
    return path


def test_a_missing_configuration_is_named(tmp_path):
    assert "no such file" in refusal(tmp_path / "config.json")


def test_an_unprepared_model_is_named_with_the_remedy(config_path):
    (config_path.parent / "model.json").unlink()
    assert "the model is not prepared" in refusal(config_path)


def test_a_folder_without_a_model_is_named(config_path):
    assert "not a model folder" in refusal(config_path)


def test_a_port_in_use_is_named(config_path):
    (config_path.parents[1] / "model" / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"rollout.port {port}" in refusal(config_path, "--port", str(port))
