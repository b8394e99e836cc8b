"""The replica's HTTP face over a scripted engine: answers, refusals, clients that hang up, a drain."""

import asyncio
import socket

import httpx
import pytest
import uvicorn
from fakes import FakeEngine
from live_replica import ScriptedEngine, scripted_replica

from services.contracts.config import load
from services.contracts.wire import Verdict
from services.grader.client import Grade
from services.learner.arithmetic_model import build_tokenizer
from services.rollout.app import create_app
from services.rollout.replica import ReplicaProcess

pytestmark = pytest.mark.integration
BODY = {"problem": "1+1", "gold": ["2"], "max_attempts": 2}


class GatedGrader:
    """Says CORRECT as soon as its gate is open."""

    def __init__(self) -> None:
        self.gate, self.num_waiting = asyncio.Event(), 0

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        self.num_waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.num_waiting -= 1
        return Grade(Verdict.CORRECT, True, "2", "exact", elapsed_ms=1.5, cached=False)


@pytest.fixture
def grader() -> GatedGrader:
    return GatedGrader()


@pytest.fixture
def replica(grader) -> ReplicaProcess:
    """A replica that is ready, without its engine."""
    config = load(None, ["--rollout.control_token=secret", "--dialogue.system_prompt="], env={})
    engine = FakeEngine([build_tokenizer().encode("\\boxed{2} etc", add_special_tokens=False)])
    return scripted_replica(config, engine=engine, grader=grader)


@pytest.fixture
async def client(replica):
    transport = httpx.ASGITransport(create_app(replica))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=10) as client:
        yield client


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_dialogue_is_answered_with_its_attempts(client, grader):
    grader.gate.set()
    answer = (await client.post("/v1/dialogues", json=BODY)).json()
    assert [(a["text"], a["verdict"], a["extracted"]) for a in answer["attempts"]] == [("\\boxed{2}", "correct", "2")]
    assert (answer["reward"], answer["finish_reason"], answer["weight_versions"]) == (1.0, "solved", [0])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/v1/dialogues", {"problem": "1+1", "gold": []}, 422, "gold"),
        ("POST", "/v1/dialogues", {**BODY, "attempts": 3}, 422, "attempts"),
        ("POST", "/v1/dialogues", {**BODY, "problem": "1" * 9000}, 422, "model.max_model_len"),
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("POST", "/control/drain", None, 401, "rollout.control_token"),
        ("POST", "/control/weights/abort", {"generation": 1}, 401, "rollout.control_token"),
    ],
)
async def test_every_refusal_is_a_problem_that_says_what_is_wrong(client, method, path, body, status, said):
    answer = await client.request(method, path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert said in answer.json()["detail"]


async def test_a_dialogue_whose_client_hangs_up_is_given_up(replica, grader):
    """Over a real connection: what is seen of a lost one is the HTTP server's doing."""
    server = uvicorn.Server(uvicorn.Config(create_app(replica), log_config=None, access_log=False, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            asking = asyncio.create_task(client.post("/v1/dialogues", json=BODY, timeout=10))
            await until(lambda: grader.num_waiting == 1)
            asking.cancel()
            await until(lambda: grader.num_waiting == 0)
        assert replica.runner.num_running == 0
        server.should_exit = True
        await asyncio.wait_for(serving, 5)


async def test_a_draining_replica_begins_no_dialogue_and_finishes_those_it_has(client, replica, grader):
    assert (await client.get("/readyz")).status_code == 200
    working = asyncio.create_task(replica._work())
    asking = asyncio.create_task(client.post("/v1/dialogues", json=BODY))
    await until(lambda: grader.num_waiting == 1)
    answer = await client.post("/control/drain", headers={"Authorization": "Bearer secret"})
    assert answer.json() == {"in_flight": 1}
    for refused in (await client.get("/readyz"), await client.post("/v1/dialogues", json=BODY)):
        assert (refused.status_code, refused.json()["detail"]) == (503, "the replica is draining")
    await asyncio.sleep(0.3)
    assert not working.done()  # it waits for the dialogue that was asked for over HTTP
    grader.gate.set()
    assert (await asking).json()["reward"] == 1.0
    await asyncio.wait_for(working, 5)


async def test_a_replica_that_still_loads_says_so(client, replica):
    replica.trouble = "the model is being loaded"
    for refused in (await client.get("/readyz"), await client.post("/v1/dialogues", json=BODY)):
        assert (refused.status_code, refused.json()["detail"]) == (503, "the model is being loaded")


async def test_a_full_replica_says_so_and_when_to_come_back(client, replica):
    replica.runner._since.update({object(): 0 for _ in range(1024)})
    answer = await client.post("/v1/dialogues", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["detail"] == "1024 dialogues are under way"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_replica_that_ends_says_so_to_the_dialogues_it_has(client, replica, grader, is_streamed):
    asking = asyncio.create_task(client.post("/v1/dialogues", json={**BODY, "stream": is_streamed}))
    await until(lambda: grader.num_waiting == 1)
    replica.done.set()
    answer = await asyncio.wait_for(asking, 5)
    assert answer.status_code == (200 if is_streamed else 503) and "the replica is stopping" in answer.text
    assert (replica.runner.num_running, grader.num_waiting) == (0, 0)


async def test_a_stream_that_cannot_begin_has_a_status(client):
    answer = await client.post("/v1/dialogues", json={**BODY, "problem": "1" * 9000, "stream": True})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("10.0.0.7", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "10.0.0.7"}, 403),
        ("127.0.0.1", {"Origin": "http://localhost:8100"}, 403),
        ("127.0.0.1", {"Authorization": "Bearer guess"}, 200),
    ],
)
async def test_without_a_token_control_is_for_programs_on_this_machine(grader, peer, headers, status):
    replica = scripted_replica(load(None, [], env={}), engine=ScriptedEngine(["x"]), grader=grader)
    transport = httpx.ASGITransport(create_app(replica), client=(peer, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica", headers=headers) as client:
        assert (await client.post("/control/pause")).status_code == status
        assert (await client.get("/v1/weights")).status_code == 200  # whoever asks


async def test_weights_are_told_once_there_are_any(client, replica):
    replica.engine, replica.trouble = ScriptedEngine(["x"]), "the model is being loaded"
    assert (await client.get("/v1/weights")).status_code == 503
