"""Log lines and health routes."""

import asyncio
import io
import json
import logging
import math
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from services.contracts.telemetry import (
    HEALTH_PATHS,
    about,
    add_health,
    configure_logging,
    health_reply,
    label_logs,
    serve_health,
)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("learner", run="demo", stream=stream)
    yield stream
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_log_line_is_one_json_object_with_the_extra_fields(log: io.StringIO) -> None:
    logging.getLogger("a.b").info("step %d", 3, extra={"loss": math.nan, "service": "impostor", "path": {"x": 1}})
    line = json.loads(log.getvalue())
    assert line.pop("ts").endswith("+00:00")
    expected = {"level": "info", "service": "learner", "run": "demo", "logger": "a.b", "msg": "step 3"}
    assert line == expected | {"loss": None, "path": {"x": 1}}


def lines(log: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


async def test_lines_say_what_they_are_about_in_tasks_and_threads_too(log: io.StringIO) -> None:
    say = logging.getLogger("a").info

    async def dialogue(task_id: int) -> None:
        with about(task_id=task_id):
            await asyncio.sleep(0)
            say("here")
            await asyncio.to_thread(say, "on a thread")

    await asyncio.gather(dialogue(1), dialogue(2))
    say("nothing")
    found = [(line["msg"], line.get("task_id")) for line in lines(log)]
    assert sorted(found[:-1]) == [("here", 1), ("here", 2), ("on a thread", 1), ("on a thread", 2)]
    assert found[-1] == ("nothing", None)


def test_labels_are_on_every_line_unless_it_says_so_itself(log: io.StringIO) -> None:
    versions = [3, 4]
    label_logs(replica="r", version=lambda: versions.pop(0))
    logging.getLogger("a").info("one")
    with about(replica="of another"):
        logging.getLogger("a").info("two", extra={"version": 9})
    assert [(line["replica"], line["version"]) for line in lines(log)] == [("r", 3), ("of another", 9)]
    configure_logging("learner", run="demo", stream=log)
    logging.getLogger("a").info("three")
    assert "replica" not in lines(log)[-1]


def test_an_exception_stays_on_its_line(log: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("a").exception("failed")
    (line,) = log.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_metrics_hold_what_was_counted() -> None:
    registry = CollectorRegistry()
    Counter("multiattempt_things", "Things.", registry=registry).inc(3)
    reply = health_reply("/metrics", lambda: None, registry=registry)
    assert reply is not None
    assert b"multiattempt_things_total 3.0" in reply.body


async def test_a_fastapi_service_is_alive_before_it_is_ready() -> None:
    app, reasons = FastAPI(), ["loading the model"]
    add_health(app, lambda: reasons[0] if reasons else None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        before = [(await client.get(path)).status_code for path in HEALTH_PATHS]
        problem = await client.get("/readyz")
        reasons.clear()
        after = [(await client.get(path)).status_code for path in HEALTH_PATHS]
    assert (before, after) == ([200, 503, 200], [200, 200, 200])
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json()["detail"] == "loading the model"


def test_a_service_without_fastapi_answers_the_same_routes_and_frees_its_port() -> None:
    server = serve_health(lambda: "no batch yet")
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        statuses = [client.get(path).status_code for path in (*HEALTH_PATHS, "/other")]
    server.close()
    assert statuses == [200, 503, 200, 404]
    serve_health(lambda: None, port=server.port).close()
