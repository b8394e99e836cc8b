"""The grader's HTTP surface: the bearer token, bad input of every kind, limits, health."""

import asyncio
import contextlib
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_grader import live_grader

from services.contracts.settings import GraderSection
from services.grader.app import create_app
from services.grader.problems import MAX_BODY_BYTES
from tests.grader_process import running, until

pytestmark = pytest.mark.integration

API_KEY = "s3cret-Key"
POSTS = ["/v1/grade", "/v1/grade/batch", "/v1/explain", "/get_reward", "/verify_answer", "/verify"]
JSON = {"content-type": "application/json"}
GOOD = b'{"response": "\\\\boxed{1}", "gold": "1"}'


@pytest.fixture(scope="module")
def locked() -> Iterator[httpx.Client]:
    """A grader that wants a bearer token."""
    with live_grader(api_key=API_KEY) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def is_problem(reply: httpx.Response, status: int) -> bool:
    """Whether the reply is a whole problem of that status."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    return body["status"] == status and bool(body["title"]) and bool(body["detail"])


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {API_KEY}", f"Bearer {API_KEY}x", b"Bearer \xff"]
)
def test_a_post_without_the_token_is_unauthorized(locked: httpx.Client, path: str, header: str | bytes | None) -> None:
    reply = locked.post(path, content=b"{", headers={} if header is None else {b"authorization": header})  # type: ignore[dict-item]
    assert is_problem(reply, 401) and reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_token_opens_every_post(locked: httpx.Client, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {API_KEY}"}
    assert locked.post("/v1/grade", json={"response": "\\boxed{1}", "gold": "1"}, headers=headers).json()["correct"]
    assert all(is_problem(locked.post(path, json={}, headers=headers), 422) for path in POSTS)


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/health"])
def test_pages_health_and_metrics_need_no_token(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_no_worker_process_holds_the_token(locked: httpx.Client) -> None:
    port, holders = str(locked.base_url.port), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is not ours to read
            if f"GRADER_API_KEY={API_KEY}".encode() in (folder / "environ").read_bytes():
                holders.append((folder / "cmdline").read_text().split("\0"))
    assert len(holders) == 1 and port in holders[0]


@pytest.mark.parametrize("key", ["two words", "broken\n", "schlüssel"])
def test_a_token_that_no_header_can_carry_is_refused_at_the_start_unseen(key: str) -> None:
    done = serve("--port", "0", GRADER_API_KEY=key)
    assert done.returncode == 2 and "GRADER_API_KEY" in done.stderr and done.stderr.count("\n") == 1
    assert key.strip() not in done.stderr


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.grader", *flags]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False
    )


def test_help_tells_of_the_token() -> None:
    assert "GRADER_API_KEY" in serve("--help").stdout


def test_a_person_at_a_terminal_is_told_where_to_point_the_browser() -> None:
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-m", "services.grader", "--port", "0", "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stdout=other_end, stderr=subprocess.DEVNULL)
    try:
        assert select.select([terminal], [], [], 30)[0]
        assert re.search(r"http://localhost:\d+/", os.read(terminal, 1_000).decode())
    finally:
        process.kill()
        process.wait(10)
        os.close(terminal)
        os.close(other_end)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"null", 422),
        (b"[]", 422),
        (b'{"resp', 422),
        (b'{"response": 5, "gold": "5"}', 422),
        (b'{"response": "5"}', 422),
        (b'{"response": "5", "gold": NaN}', 422),
        (b'{"response": "5", "gold": -Infinity}', 422),
        (b'{"response": "5", "gold": []}', 422),
        (b'{"response": "5", "gold": [1]}', 422),
        (b'{"response": "5", "gold": [' + b'"5",' * 64 + b'"5"]}', 422),
        (b'{"response": "5", "gold": "5", "golden": 1}', 422),
        (b'{"response": "5", "gold": "5", "\\ud800": 1}', 422),
        (b'{"response": "5", "gold": "5", "id": 1e999}', 422),
        (b'{"response": "5", "gold": ' + b"9" * 4_000 + b"}", 422),
        (b'{"response": "5", "gold": ' + b"9" * 10_000 + b"}", 400),
        (b'{"response": "\xff", "gold": "5"}', 400),
        (b"[" * 100_000, 400),
        (b'{"response":' * 100_000, 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_malformed_bodies_are_problems(grader_http: httpx.Client, body: bytes, status: int) -> None:
    assert is_problem(grader_http.post("/v1/grade", content=body, headers=JSON), status)


@pytest.mark.parametrize(
    "text", ["\\ud800", "\\udfff\\ud800", "\\u0000", "\\u202e", "\\u0085", "\\u00b2", "\\ud83d\\ude00"]
)
def test_odd_characters_are_graded_like_any_other(grader_http: httpx.Client, text: str) -> None:
    body = f'{{"response": "{text} \\\\boxed{{7{text}x}}", "gold": ["6", "{text}"], "id": "{text}"}}'
    reply = grader_http.post("/v1/grade", content=body.encode(), headers=JSON)
    assert reply.status_code == 200, reply.text
    assert reply.json()["verdict"] == "incorrect"


def test_of_a_key_that_comes_twice_the_last_counts(grader_http: httpx.Client) -> None:
    reply = grader_http.post("/v1/grade", content=b'{"response": "", ' + GOOD[1:], headers=JSON)
    assert reply.json()["correct"] is True


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_a_body_of_another_media_type_is_a_problem(grader_http: httpx.Client, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    assert is_problem(grader_http.post("/v1/grade", content=GOOD, headers=headers), 415)


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON", "application/ld+json"])
def test_json_by_any_name_is_taken(grader_http: httpx.Client, media_type: str) -> None:
    assert grader_http.post("/v1/grade", content=GOOD, headers={"content-type": media_type}).json()["correct"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/grade", 405), ("DELETE", "/get_reward", 405), ("POST", "/healthz", 405), ("PATCH", "/", 405),
     ("GET", "/nowhere", 404), ("POST", "/v1/grade/", 404), ("GET", "/static-offline-docs/../app.py", 404)],
)  # fmt: skip
def test_a_wrong_method_or_path_is_a_problem(grader_http: httpx.Client, method: str, path: str, status: int) -> None:
    reply = grader_http.request(method, path)
    assert is_problem(reply, status) and ("allow" in reply.headers) == (status == 405)


def test_a_body_over_the_limit_of_undeclared_length_is_a_problem(grader_http: httpx.Client) -> None:
    chunks = (b" " * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 1))
    assert is_problem(grader_http.post("/v1/grade", content=chunks, headers=JSON), 413)


def test_lies_about_the_length_leave_the_grader_standing(grader_http: httpx.Client) -> None:
    for length in (b"-1", b"1e9", b"9" * 5_000, b"100000"):
        with socket.create_connection((str(grader_http.base_url.host), grader_http.base_url.port or 0), 10) as raw:
            raw.sendall(
                b"POST /v1/grade HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                + length + b"\r\n\r\n{}"
            )  # fmt: skip
    assert grader_http.get("/readyz").status_code == 200


def test_batches_of_no_items_and_of_the_most_are_graded(grader_http: httpx.Client) -> None:
    assert batch(grader_http, 0).json() == {"results": []}
    reply = batch(grader_http, 10_000)
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    assert [result["id"] for result in results] == [str(n) for n in range(10_000)]
    assert {result["correct"] for result in results if int(result["id"]) % 2} == {False}
    assert {result["correct"] for result in results if not int(result["id"]) % 2} == {True}


def test_a_batch_over_the_limit_is_a_problem_that_names_the_limit(grader_http: httpx.Client) -> None:
    reply = batch(grader_http, 10_001)
    assert is_problem(reply, 422) and "10000" in reply.json()["detail"]


def batch(client: httpx.Client, num_items: int, *, first: int = 0) -> httpx.Response:
    items = [
        {"response": f"\\boxed{{{first + n}}}", "gold": f"{first + n + n % 2}", "id": str(n)} for n in range(num_items)
    ]
    return client.post("/v1/grade/batch", json={"items": items})


def test_the_loop_answers_while_a_full_batch_is_graded(grader_http: httpx.Client) -> None:
    """Parsing and extraction of 10,000 items happen on the event loop: no probe may wait for long."""
    with ThreadPoolExecutor(1) as pool:
        running, slowest_s = pool.submit(batch, grader_http, 10_000, first=10**6), 0.0
        while not running.done():
            started = time.monotonic()
            assert grader_http.get("/healthz").status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - started)
    assert slowest_s < 2.0


async def test_more_than_the_queue_has_room_for_is_refused_for_now() -> None:
    app = create_app(GraderSection(workers=1, queue_size=1))  # its worker takes longer to start than both requests
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://grader", timeout=60) as client,
    ):
        bodies = [{"response": f"\\boxed{{{n}}}", "gold": f"{n}"} for n in range(2)]
        queued, refused = await asyncio.gather(*(client.post("/v1/grade", json=body) for body in bodies))
    assert queued.json()["correct"] is True
    assert is_problem(refused, 503) and refused.headers["retry-after"] == "1"


def test_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    with running(tmp_path, workers=1) as grader, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batch, grader.client, 5_000)
        until(lambda: grader.metric("multiattempt_grader_queue_items") > 0)
        grader.process.send_signal(signal.SIGTERM)
        assert len(waiting.result(30).json()["results"]) == 5_000
        assert grader.process.wait(15) == 0  # a second signal while the interpreter ends would be its exit code


def test_every_answer_tells_browsers_what_it_may_do(grader_http: httpx.Client) -> None:
    for path in ("/", "/docs", "/v1/grade", "/healthz", "/nowhere"):
        headers = grader_http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]


def test_every_refusal_is_documented_with_the_schema_of_problems(grader_http: httpx.Client) -> None:
    document: dict[str, Any] = grader_http.get("/openapi.json").json()
    for path in POSTS:
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "413", "415", "422", "503"} <= set(responses), path
        for status in set(responses) - {"200"}:
            schema = responses[status]["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}
