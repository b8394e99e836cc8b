"""What the console's page asks for: steps as they come, dialogues that fit, Redis there or away; read-only."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_console import live_console
from redis.asyncio import Redis

from services.console.source import Metrics
from services.contracts.config import RunConfig, load, load_resolved
from services.contracts.observations import Notice, Observations, Vitals
from services.contracts.registry import Registry, Replica

pytestmark = pytest.mark.integration

DEMO = Path(__file__).parents[1] / "data" / "demo_run"


@pytest.fixture(scope="module")
def demo() -> Iterator[httpx.Client]:
    """The console of a real run that is over."""
    with live_console(load_resolved(DEMO / "config.json"), DEMO) as url, httpx.Client(base_url=url) as client:
        yield client


def test_a_run_that_is_over_has_its_steps_and_says_that_nothing_runs(demo: httpx.Client) -> None:
    first = demo.get("/api/steps").json()
    assert [row["step"] for row in first["rows"]] == list(range(1, 41))
    again = demo.get("/api/steps", params={"after": 38, "generation": first["generation"]}).json()
    assert [row["step"] for row in again["rows"]] == [39, 40]
    other = demo.get("/api/steps", params={"after": 38, "generation": "of another life"}).json()
    assert len(other["rows"]) == 40
    live = demo.get("/api/live").json()
    assert live["is_up"] is False and "127.0.0.1:1" in live["reason"]


@pytest.mark.parametrize(
    ("outcome", "fits"),
    [
        ("first", lambda verdicts: verdicts == ["correct"]),
        ("later", lambda verdicts: len(verdicts) > 1 and verdicts[-1] == "correct"),
        ("incorrect", lambda verdicts: verdicts[-1] == "incorrect"),
        ("no_answer", lambda verdicts: verdicts[-1] == "no_answer"),
    ],
)
def test_dialogues_are_found_by_their_outcome(demo: httpx.Client, outcome: str, fits) -> None:  # type: ignore[no-untyped-def]
    found = demo.get("/api/dialogues", params={"outcome": outcome}).json()
    assert found["steps"] == [1, 20, 40]
    assert found["dialogues"] and all(fits(dialogue["verdicts"]) for dialogue in found["dialogues"])
    assert [d["step"] for d in found["dialogues"]] == sorted((d["step"] for d in found["dialogues"]), reverse=True)


def test_dialogues_are_found_by_step_text_and_task(demo: httpx.Client) -> None:
    listed = demo.get("/api/dialogues", params={"step": 20}).json()["dialogues"]
    assert {dialogue["step"] for dialogue in listed} == {20}
    one = listed[0]
    for text in (one["problem"], str(one["task_id"])):
        found = demo.get("/api/dialogues", params={"text": text}).json()["dialogues"]
        assert one in found and len(found) < len(listed)
    assert demo.get("/api/dialogues", params={"step": 7}).json()["dialogues"] == []


def test_a_dialogue_has_tokens_with_probabilities_advantages_and_versions(demo: httpx.Client) -> None:
    one = demo.get("/api/dialogues", params={"outcome": "later"}).json()["dialogues"][0]
    dialogue = demo.get(f"/api/dialogues/{one['step']}/{one['task_id']}").json()
    sampled = {i for attempt in dialogue["attempts"] for i in range(attempt["start"], attempt["end"])}
    assert {i for i, value in enumerate(dialogue["logprobs"]) if value is not None} == sampled
    assert {i for i, value in enumerate(dialogue["advantages"]) if value is not None} == sampled
    assert {i for _, start, end in dialogue["versions"] for i in range(start, end)} == sampled
    last = dialogue["attempts"][-1]
    assert f"\\boxed{{{last['extracted']}}}" in "".join(dialogue["tokens"][last["start"] : last["end"]])


@pytest.mark.parametrize("path", ["/api/dialogues/20/999999", "/api/dialogues/999/1"])
def test_a_dialogue_that_is_not_there_is_a_404_that_says_why(demo: httpx.Client, path: str) -> None:
    reply = demo.get(path)
    assert reply.status_code == 404 and "thinned out" in reply.json()["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/api/run", "/api/live", "/api/steps", "/api/dialogues", "/static/app.js"])
def test_it_can_only_be_read(demo: httpx.Client, method: str, path: str) -> None:
    assert demo.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2f..%2fcontracts/web.py"])
def test_files_outside_the_page_are_not_served(demo: httpx.Client, path: str) -> None:
    assert demo.get(path).status_code == 404


def test_browsers_may_run_scripts_of_this_host_alone(demo: httpx.Client) -> None:
    policy = demo.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert demo.get("/api/run").headers["content-security-policy"].startswith("default-src 'none'")


def test_no_secret_of_the_configuration_is_told(tmp_path: Path) -> None:
    flags = ["--rollout.control_token=hunter2", "--redis.url=redis://:hunter2@127.0.0.1:1/0"]
    with live_console(load(None, flags, env={}), tmp_path) as url:
        told = "".join(httpx.get(f"{url}/api/{path}").text for path in ("run", "live", "steps", "dialogues"))
    assert "hunter2" not in told


def test_metrics_follow_a_file_that_grows_and_one_that_a_resumed_learner_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.refresh()
    assert metrics.rows == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    metrics.refresh()
    first = metrics.generation
    assert [row["step"] for row in metrics.rows] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    metrics.refresh()
    assert ([row["step"] for row in metrics.rows], metrics.generation) == ([1, 2, 3], first)
    path.write_text('{"step": 1}\n{"step": 2, "again": true}\n{"step": 3, "again": true}\n')
    metrics.refresh()
    assert [row.get("again") for row in metrics.rows] == [None, True, True] and metrics.generation != first
    path.unlink()
    metrics.refresh()
    assert metrics.rows == []


async def fill(redis: Redis, config: RunConfig) -> None:
    seen, registry = Observations(redis, run=config.run.name), Registry(redis, run=config.run.name)
    await seen.add_step(1, {"reward": 0.5})
    await seen.put_vitals(Vitals(name="learner", service="learner", at=time.time(), figures={"phase": "waiting"}))
    await seen.add_notices([Notice(at=time.time(), name="rollout-0", level="warning", message="m")])
    replica = Replica(
        replica_id="rollout-0", url="http://h:1", world_size=1, version=0, device="cpu", state="ready", pid=1,
        started_at=0,
    )  # fmt: skip
    await registry.announce(replica, 60)


async def test_without_the_runs_folder_redis_alone_shows_the_run(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    config = load(None, ["--redis.url", redis_url], env={})
    await fill(redis, config)
    with live_console(config, tmp_path / "elsewhere") as url:
        live, steps = httpx.get(f"{url}/api/live").json(), httpx.get(f"{url}/api/steps").json()
        dialogues = httpx.get(f"{url}/api/dialogues").json()
    assert live["is_up"] and live["replicas"][0]["replica_id"] == "rollout-0"
    assert live["vitals"][0]["figures"] == {"phase": "waiting"} and live["notices"][0]["message"] == "m"
    assert steps["rows"] == [{"step": 1, "reward": 0.5}]
    assert "not on this machine" in dialogues["reason"]


def test_a_damaged_file_of_dialogues_is_a_message_and_costs_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "run")
    (tmp_path / "run/dialogues/step-00000021.jsonl.gz").write_bytes(b"no gzip")
    with live_console(load_resolved(DEMO / "config.json"), tmp_path / "run") as url:
        broken = httpx.get(f"{url}/api/dialogues")
        assert broken.status_code == 500 and "step-00000021" in broken.json()["detail"]
        assert httpx.get(f"{url}/api/dialogues", params={"step": 20}).status_code == 200


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "serve", "console", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == (
        f"multiattempt: error: {tmp_path}: not a run, it has no config.json; runs are folders under runs/\n"
    )


def test_its_logs_are_json_lines_with_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.console", str(DEMO), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = json.loads(process.stderr.readline())
            assert (line["service"], line["run"], line["msg"]) == ("console", "demo", "listening")
            assert httpx.get(f"http://127.0.0.1:{line['port']}/readyz", timeout=30).status_code == 200
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
