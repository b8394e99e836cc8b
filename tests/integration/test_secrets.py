"""No secret is in anything that services and commands say: logs, error answers, metrics, the terminal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from services.contracts.config import load, to_toml_dict
from tests.grader_process import until
from tests.processes import free_port

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
PASSWORD, TOKEN, KEY = "pass-4f1c9e", "token-8a2b7d", "key-5d0e3f"


def test_the_graders_key_is_in_no_log_answer_or_metric(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "services.grader", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "GRADER_API_KEY_FILE": str(tmp_path / "key")}
    with (tmp_path / "log").open("wb") as log, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            until(lambda: is_ready(client), 60)
            said = []
            for key, expected in ((KEY, 200), ("wrong", 401), (f"{KEY}x", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                answer = client.post("/v1/grade", json={"response": "\\boxed{1}", "gold": "1"}, headers=headers)
                assert answer.status_code == expected
                said.append(f"{answer.headers} {answer.text}")
            said.append(client.post("/v1/grade", content=b"{", headers={"Authorization": f"Bearer {KEY}"}).text)
            said += [client.get(path).text for path in ("/", "/metrics", "/openapi.json", "/readyz")]
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait(15)
    said.append((tmp_path / "log").read_text(encoding="utf-8"))
    assert '"msg":"listening"' in said[-1] and not [text for text in said if KEY in text]


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """Of a run whose store does not answer; the model's folder has no more than a name."""
    url = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    flags = ["--run.dir", str(tmp_path), "--run.name", "x", "--redis.url", url, "--rollout.control_token", TOKEN]
    flags += ["--rollout.device", "cpu", "--grader.url", "http://127.0.0.1:1"]
    config = load(None, flags, env={})
    config.run_dir.mkdir()
    path = config.run_dir / "config.json"
    path.write_text(json.dumps(to_toml_dict(config)), encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(tmp_path / "model")}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("services.learner", "--config", "{config}"),
        ("services.rollout", "--config", "{config}", "--port", "0"),
        ("services.evaluation", "--config", "{config}", "--label", "before"),
        ("services.cli", "status", "{run}"),
        ("services.cli", "audit", "{run}"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_store_that_does_not_answer_is_named_without_its_password(
    config_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"config": str(config_path), "run": str(config_path.parent)}
    words = [part.format(**places) for part in command]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and "127.0.0.1:1" in said, said
    assert PASSWORD not in said and TOKEN not in said
