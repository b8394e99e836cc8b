"""The CPU stack on a real Docker engine: it comes up and trains, is scaled, loses each service, and goes on.

Minutes, and gigabytes for the images; skipped where no engine answers. pytest's `-o log_cli=true
--log-cli-level=INFO` shows what was measured.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.compose_stack import ENGINE, GRADER, ROOT, Stack, build, docker, has_engine, until

HEALTHY_S = 300  # on two cores that others use too
STEP_S = 240
KEPT = ("redis", "grader", "rollout", "learner")
# The demo in small: updates of 64 dialogues, a checkpoint every fourth, and no end before the test's.
SETTINGS = {
    "MULTIATTEMPT_RUN__STEPS": "100000",
    "MULTIATTEMPT_MODEL__WARMUP_STEPS": "20",
    "MULTIATTEMPT_LEARNER__BATCH_DIALOGUES": "64",
    "MULTIATTEMPT_LEARNER__MINIBATCH_DIALOGUES": "64",
    "MULTIATTEMPT_LEARNER__CHECKPOINT_EVERY": "4",
    "MULTIATTEMPT_REDIS__LEASE_S": "8",
}
ASK_GRADER = """
import json, urllib.request
headers = {"Content-Type": "application/json"}
if KEY:
    headers["Authorization"] = "Bearer " + open("/run/secrets/grader_api_key").read()
body = json.dumps({"response": chr(92) + "boxed{4}", "gold": "4"}).encode()
request = urllib.request.Request("http://grader:8000/v1/grade", body, headers)
print(json.load(urllib.request.urlopen(request, timeout=30))["verdict"])
"""
log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not has_engine(), reason="no Docker engine answers here"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, up and at its second update."""
    scratch = tmp_path_factory.mktemp("compose")
    scratch.chmod(0o755)
    stack = Stack(f"ma-test-{os.getpid()}", scratch, settings=SETTINGS, say=log.info)
    stack.timed("images built", lambda: build(scratch))
    for image in (ENGINE, GRADER):
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image))
        log.info("%s: %.0f MB", image, size / 1e6)
    try:
        stack.timed("up: containers started", stack.up)
        stack.timed("up: then all healthy", lambda: healthy(stack))
        stack.timed("up: then the first update", lambda: until("an update", stack.step, timeout_s=STEP_S))
        yield stack
    finally:
        stack.down(forget=True)


def healthy(stack: Stack, services: tuple[str, ...] = KEPT) -> None:
    for service in services:
        until(f"{service} healthy", lambda service=service: stack.healthy(service), timeout_s=HEALTHY_S)


def trains(stack: Stack, updates: int = 2) -> None:
    """Wait for that many more updates."""
    before = stack.step()
    until(f"{updates} more updates", lambda: stack.step() >= before + updates, timeout_s=STEP_S)


def test_the_containers_are_locked_down(stack: Stack) -> None:
    for service in ("grader", "rollout", "learner"):
        assert stack.compose("exec", "-T", service, "id", "-u") == "10001"
        denied = "import pathlib, services; pathlib.Path(services.__file__).with_name('x').write_text('x')"
        with pytest.raises(AssertionError, match="Read-only file system"):
            stack.run(denied, service)
        tools = (
            "import shutil; print([t for t in ('gcc', 'cc', 'g++', 'clang', 'make', 'pip', 'git') if shutil.which(t)])"
        )
        assert stack.run(tools, service) == "[]"


def test_the_store_answers_nobody_without_the_password(stack: Stack) -> None:
    code = "import redis; redis.Redis('redis').ping()"
    with pytest.raises(AssertionError, match=r"AuthenticationError|Authentication required"):
        stack.run(code)
    assert not stack.containers("redis")[0]["Publishers"]
    assert stack.secrets["redis_password"] not in stack.compose("top", "redis")


def test_nothing_gets_out_of_the_inner_network(stack: Stack) -> None:
    code = "import socket; socket.create_connection(('1.1.1.1', 443), timeout=3)"
    for service in ("rollout", "learner", "grader"):
        with pytest.raises(AssertionError, match=r"unreachable|timed out|TimeoutError"):
            stack.run(code, service)


def test_the_grader_wants_its_key(stack: Stack) -> None:
    port = stack.compose("port", "grader", "8000")
    assert port.startswith("127.0.0.1:")
    assert stack.run(ASK_GRADER.replace("KEY", "True")) == "correct"
    with pytest.raises(AssertionError, match="401"):
        stack.run(ASK_GRADER.replace("KEY", "False"))


def test_replicas_come_and_go_while_it_trains(stack: Stack) -> None:
    def scaled(count: int) -> Callable[[], None]:
        def wait() -> None:
            stack.up("--scale", f"rollout={count}", "--no-recreate")
            until(f"{count} replicas", lambda: len(stack.replicas()) == count, timeout_s=HEALTHY_S)

        return wait

    stack.timed("rollout 1 -> 3: all announced", scaled(3))
    trains(stack)
    versions = stack.replicas()
    assert len(versions) == 3 and min(versions) > 0, versions  # newcomers hold trained weights
    stack.timed("rollout 3 -> 1: two withdrawn", scaled(1))
    trains(stack)


@pytest.mark.parametrize("service", KEPT)
def test_a_service_that_crashes_comes_back_by_itself(stack: Stack, service: str) -> None:
    before = stack.step()

    def recovers() -> None:
        os.kill(stack.main_process(service), signal.SIGKILL)
        until("it ended", lambda: restarts(stack, service) > started, timeout_s=60, pause_s=0.1)
        healthy(stack, (service,))

    started = restarts(stack, service)
    stack.timed(f"{service} killed: healthy again", recovers)
    stack.timed(
        f"{service} killed: then two more updates",
        lambda: until("updates", lambda: stack.step() >= before + 2, timeout_s=STEP_S),
    )


def restarts(stack: Stack, service: str) -> int:
    return int(docker("inspect", "--format", "{{.RestartCount}}", stack.containers(service)[0]["ID"]))


@pytest.mark.parametrize("service", KEPT)
def test_a_service_that_somebody_kills_leaves_the_others_running(stack: Stack, service: str) -> None:
    """Docker starts nothing again that it was itself told to kill: `up` does."""
    docker("kill", stack.containers(service)[0]["ID"])
    others = [name for name in KEPT if name != service]
    assert all(stack.containers(name)[0]["State"] == "running" for name in others)

    def recovers() -> None:
        stack.up("--no-recreate")
        healthy(stack)

    stack.timed(f"docker kill {service}, up: all healthy", recovers)
    trains(stack, 1)


def test_it_goes_on_after_down_and_up(stack: Stack) -> None:
    trains(stack, 5)  # past a checkpoint
    stack.timed("down", lambda: stack.down(forget=False))

    def resumes() -> None:
        stack.up()
        healthy(stack)

    stack.timed("up again: all healthy", resumes)
    said = [line for line in stack.logs().splitlines() if '"msg":"resumed"' in line]
    assert said, "the learner did not say that it resumed"
    stack.timed("up again: then two updates", lambda: trains(stack))


def test_every_task_is_accounted_for_after_all_that(stack: Stack) -> None:
    audit = stack.compose("exec", "-T", "learner", "multiattempt", "audit", "/runs/demo")
    assert "every task is in exactly one state" in audit


def test_no_secret_is_in_what_was_said(stack: Stack) -> None:
    said = stack.logs() + docker("inspect", *(c["ID"] for name in KEPT for c in stack.containers(name)))
    assert len(said) > 10_000
    assert not [name for name, value in stack.secrets.items() if value in said]
    assert str(ROOT) not in stack.run("import services; print(services.__file__)")
