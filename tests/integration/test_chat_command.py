"""`multiattempt chat` as a process, against a replica over HTTP whose model says what a script has."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_replica import LiveReplica, live_replica
from redis.asyncio import Redis

from services.contracts.config import load, to_toml_dict
from services.contracts.registry import Registry, Replica

pytestmark = pytest.mark.integration
COMMAND = [sys.executable, "-m", "services.cli", "chat"]
WAIT_S = 20.0


@pytest.fixture(scope="module")
def live(grader_url: str) -> Iterator[LiveReplica]:
    """47+25: 62, then 72, then nothing; then an attempt that never ends."""
    script = ["so \\boxed{62}", "\\boxed{72} it is", "no idea \x1b[2J", None]
    with live_replica(script, grader_url=grader_url) as replica:
        yield replica


@pytest.fixture
def chat(live: LiveReplica, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str, text: str = "", url: str | None = live.url) -> tuple[int, str, str]:
        where = () if url is None else ("--url", url)
        done = subprocess.run(
            [*COMMAND, *words, *where], input=text, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    return run


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "never so"
        time.sleep(0.01)


def test_the_grader_judges_a_problem_with_its_gold_answer(chat) -> None:
    code, out, err = chat("47+25", "--gold", "70", "--gold", "72", "--seed", "0")
    assert (code, err) == (0, "")
    *lines, last, empty = out.split("\n")
    assert lines == [
        "attempt 1 of 5", "so \\boxed{62}", "incorrect: 62",
        "user", "Your answer is incorrect. You have 4 attempts left. Try an alternative.", "assistant",
        "attempt 2 of 5", "\\boxed{72}", "correct: 72",
    ]  # fmt: skip
    assert last.startswith("solved after 2 attempts, reward +1, ") and last.endswith(" seed 0, weight version 0")
    assert empty == ""


def test_the_sampling_asked_for_is_the_replicas(chat, live, grader_url: str) -> None:
    chat("1+1", "--gold", "72", "--seed", "1", "--temperature", "0", "--attempts", "3")
    assert (live.engine.seeds[-1], live.engine.samplings[-1].temperature) == (1, 0.0)
    with live_replica(["no idea"], grader_url=grader_url) as other:
        chat("1+1", "--gold", "72", "--attempts", "1", url=other.url)
        chat("1+1", "--gold", "72", "--attempts", "1", url=other.url)
    assert other.engine.samplings[-1].temperature is None and len(set(other.engine.seeds)) == 2


def test_without_gold_a_person_judges_and_may_mistype(chat) -> None:
    code, out, err = chat("47+25", "--seed", "0", text="maybe\nn\nyes\n")
    assert (code, err) == (0, "")
    assert "right? [y/n/none] maybe\ny: right, n: wrong, none: there is no answer\nright? [y/n/none] n\n" in out
    assert "incorrect\n" in out and "correct\nsolved after 2 attempts" in out


def test_a_session_has_several_problems_and_ends_with_its_input(chat) -> None:
    code, out, err = chat("--seed", "0", "--attempts", "2", text="47+25 => 72\n\n1+1\nnone\nn\n")
    assert (code, err) == (0, "")
    assert out.count("problem> ") == 3 and "problem> 47+25 => 72\nattempt 1 of 2\n" in out
    assert "solved after 2 attempts, reward +1" in out and "not solved after 2 attempts, reward -0.5" in out
    assert "No boxed answer was found." in out


def test_what_the_model_says_cannot_command_the_terminal(chat) -> None:
    code, out, _ = chat("47+25", "--gold", "72", "--seed", "2", "--attempts", "1")
    assert code == 0 and "no idea \\x1b[2J\nno answer\n" in out and "\x1b" not in out


def test_text_that_is_no_unicode_is_still_a_problem(chat) -> None:
    code, _, err = chat("1+\udcff1", "--gold", "72", "--seed", "1")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("words", "url", "said"),
    [
        (["1+1", "--gold", "2"], "http://127.0.0.1:9", "no replica answers at http://127.0.0.1:9"),
        (["1+1", "--gold", "2"], "127.0.0.1:8100", "write it as http://host:port"),
        (["1+1", "--gold", "2"], "http://[::1", "write it as http://host:port"),
        (["1+1", "--gold", "2"], "", "write it as http://host:port"),
        (["1+1", "--gold", "2"], None, "no run under"),
        (["1+1", "--gold", "2", "--run", "nowhere"], None, "nowhere: not a run"),
        (["--gold", "2"], "http://127.0.0.1:9", "problem => answer"),
        (["1+1", "--attempts", "many"], None, "invalid int value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(chat, words: list[str], url: str | None, said: str) -> None:
    code, out, err = chat(*words, url=url)
    assert (code, out) == (2, "")
    assert err.startswith("multiattempt: error: ") and said in err and err.count("\n") == 1


def test_what_the_replica_refuses_is_one_line_and_exit_code_2(chat) -> None:
    code, _, err = chat("1+1", "--gold", "2", "--attempts", "99")
    assert code == 2 and "max_attempts" in err and err.count("\n") == 1
    code, _, err = chat("1+1" * 2000, "--gold", "2")
    assert code == 2 and "model.max_model_len" in err and err.count("\n") == 1


def test_something_else_that_answers_is_named(chat, grader_url: str) -> None:
    code, _, err = chat("1+1", "--gold", "2", url=grader_url)
    assert code == 2 and "is no replica" in err and err.count("\n") == 1


def test_a_draining_replica_says_so(chat, live) -> None:
    live.replica.worker.is_draining = True
    try:
        code, _, err = chat("1+1", "--gold", "2")
    finally:
        live.replica.worker.is_draining = False
    assert (code, err) == (1, "multiattempt: error: the replica refuses the problem: the replica is draining\n")


def test_a_verdict_that_nobody_gives_is_one_line_and_the_dialogue_ends(chat, live) -> None:
    code, _, err = chat("47+25", "--seed", "0")
    assert code == 1 and "--gold lets the grader judge" in err and err.count("\n") == 1
    until(lambda: live.replica.runner.num_running == 0)


def test_the_end_of_the_replica_is_one_line() -> None:
    with live_replica([None]) as live:
        process = subprocess.Popen([*COMMAND, "1+1", "--url", live.url], stderr=subprocess.PIPE, text=True)
        until(lambda: live.engine.num_endless == 1)
        live.end()
        assert process.communicate(timeout=WAIT_S)[1] == "multiattempt: error: the replica is stopping\n"
        assert process.returncode == 1 and live.engine.num_endless == 0


def test_ctrl_c_ends_the_dialogue_on_the_replica(live: LiveReplica) -> None:
    words = ["1+1", "--seed", "3", "--url", live.url]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: live.engine.num_endless == 1)
    process.send_signal(signal.SIGINT)
    assert (process.wait(WAIT_S), process.communicate()[1]) == (130, "")
    until(lambda: live.engine.num_endless == 0 and live.replica.runner.num_running == 0)


def test_a_reader_that_has_seen_enough_is_no_error(live: LiveReplica) -> None:
    line = f"{sys.executable} -m services.cli chat 1+1 --seed 3 --url {live.url} | head -c 40"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (len(done.stdout), done.stderr) == (40, "")
    until(lambda: live.engine.num_endless == 0)


def test_a_terminal_has_colours_and_ctrl_c_keeps_the_session(live: LiveReplica) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--seed", "0", "--url", live.url],
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "NO_COLOR": ""},
    )  # fmt: skip
    os.close(slave)
    shown = ""

    def see(text: str) -> None:
        nonlocal shown
        end = time.monotonic() + WAIT_S
        while text not in shown:
            assert time.monotonic() < end, shown
            shown += os.read(master, 4096).decode()
        shown = shown.partition(text)[2]

    try:
        see("problem> ")
        os.write(master, b"1+1\n")
        see("\x1b[1mattempt 1 of 5")
        see("right? [y/n/none] ")
        os.write(master, b"n\n")
        see("\x1b[1;31mincorrect")
        see("right? [y/n/none] ")
        process.send_signal(signal.SIGINT)
        while not select.select([master], [], [], 1.0)[0]:  # readline misses one between its prompt and its wait
            process.send_signal(signal.SIGINT)
        see("ended")
        see("problem> ")
        until(lambda: live.replica.runner.num_running == 0)
        os.write(master, b"47+25 => 62\n")
        see("\x1b[1;32mcorrect")
        see("problem> ")
        os.write(master, b"\x04")
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait(WAIT_S)
        os.close(master)


async def test_the_newest_runs_ready_replica_is_found(chat, live, redis: Redis, redis_url: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    flags = ["--run.name=x", f"--redis.url={redis_url}"]
    (run / "config.json").write_text(json.dumps(to_toml_dict(load(None, flags, env={}))))
    code, _, err = chat("47+25", "--gold", "72", url=None)
    assert code == 2 and "runs/x: no replica is ready (there is none)" in err and err.count("\n") == 1

    registry = Registry(redis, run="x")
    for name, state, url in (("a", "draining", "http://127.0.0.1:9"), ("b", "ready", live.url)):
        await registry.announce(
            Replica(
                replica_id=name, url=url, world_size=1, version=0, device="cpu", state=state, pid=1, started_at=0.0
            ),
            60.0,
        )
    for words in ((), ("--run", str(run))):
        code, out, err = chat("47+25", "--gold", "72", "--seed", "0", *words, url=None)
        assert (code, err) == (0, "") and "solved after 2 attempts" in out
