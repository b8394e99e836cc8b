"""`multiattempt chat`: dialogues with a running replica in the terminal, judged by the grader or by who reads them.

Text is shown as it is sampled. Hanging up ends a dialogue on the replica, so Ctrl-C does no more than that. What a
model says is not to be trusted with a terminal: its control characters are shown, not obeyed.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from services.contracts.config import ConfigError, load_resolved
from services.contracts.runs import newest_run, resolved_config

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
CONNECT_S = 5.0
LOOK_S = 10.0  # for a first answer
SILENCE_S = 35.0  # a dialogue gives a sign of life every ten seconds
REDIS_S = 2.0
SEPARATOR = " => "
VERDICTS = {"y": "correct", "yes": "correct", "n": "incorrect", "no": "incorrect", "none": "no_answer"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ENDS = {"solved": "solved", "attempts": "not solved", "length": "cut off"}
STYLES = {"correct": "bold green", "incorrect": "bold red"}  # other verdicts: yellow


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What was asked for on the command line."""

    problem: str | None
    gold: list[str] | None
    url: str | None
    run: Path | None
    attempts: int
    seed: int | None
    temperature: float | None


class ChatError(RuntimeError):
    """A dialogue that did not come to its end, in one line."""


class RefusedError(ChatError):
    """The replica does not take the problem as it is."""


class InputEnded(ChatError):
    """A verdict is wanted, and there is nobody to give it."""


def run_chat(options: ChatOptions) -> int:
    """One dialogue, or a session of them. Returns 0; 1 after a dialogue that did not end; 130 interrupted.

    Raises ConfigError for a mistake on the command line, and when there is no replica to talk to.
    """
    if options.problem is None and options.gold:
        raise ConfigError(f"--gold is for a problem on the command line; in a session write: problem{SEPARATOR}answer")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with httpx.Client(base_url=_url(options), timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S)) as client:
            return _Chat(client, options).run()
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _url(options: ChatOptions) -> str:
    if options.url is not None:
        try:
            url = httpx.URL(options.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {options.url}: {error}; write it as http://host:port") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"--url {options.url}: write it as http://host:port")
        return options.url
    from services.contracts.store import connect  # needs the Redis client, which `--url` does not

    run = options.run or newest_run()
    config = load_resolved(resolved_config(run))

    async def replicas() -> list[Any]:
        from services.contracts.registry import Registry

        redis = await connect(config.redis.url, patience_s=REDIS_S, start_patience_s=REDIS_S)
        try:
            return list(await Registry(redis, run=config.run.name).replicas())
        finally:
            await redis.aclose()

    try:
        found = asyncio.run(replicas())
    except ConfigError as error:
        raise ConfigError(
            f"{run}: not running, nothing answers at {config.redis.url}; start it, or name a replica with --url"
        ) from error
    ready = [replica.url for replica in found if replica.state == "ready"]
    if not ready:
        states = ", ".join(f"{replica.replica_id} is {replica.state}" for replica in found) or "there is none"
        raise ConfigError(f"{run}: no replica is ready ({states}); wait, or name one with --url")
    return str(ready[0])


class _Chat:
    """A session with one replica."""

    def __init__(self, client: httpx.Client, options: ChatOptions) -> None:
        self._client, self._options = client, options
        self._console = Console(highlight=False)
        self._is_line_open = False

    def run(self) -> int:
        """One dialogue, or as many as are asked for until the input ends."""
        version = self._look()
        if self._options.problem is not None:
            try:
                self._dialogue(self._options.problem, self._options.gold)
            except RefusedError as error:
                raise ConfigError(str(error)) from error
            except ChatError as error:
                return _complain(error)
            return EXIT_DONE
        self._write_line(f"{self._client.base_url}, weight version {version}", "dim")
        if sys.stdin.isatty():
            self._write_line(
                f"A problem, or problem{SEPARATOR}answer. Ctrl-C ends a dialogue, Ctrl-D the session.", "dim"
            )
        return self._session()

    def _session(self) -> int:
        code = EXIT_DONE
        while True:
            try:
                line = _read("problem> ")
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return code
            problem, _, answer = line.partition(SEPARATOR)
            if not problem.strip():
                continue
            try:
                self._dialogue(problem.strip(), [answer.strip()] if answer.strip() else None)
            except InputEnded as error:
                return _complain(error)
            except ChatError as error:
                code = _complain(error)
            except KeyboardInterrupt:
                self._write_line("ended", "dim")

    def _look(self) -> int:
        """The version of the replica's weights. Raises ConfigError when no replica answers."""
        url = self._client.base_url
        try:
            answer = self._client.get("/v1/weights", timeout=LOOK_S)
        except httpx.TransportError as error:
            raise ConfigError(f"no replica answers at {url} ({_why(error)}); see multiattempt status") from error
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise ConfigError(f"the replica at {url} is not ready: {_detail(answer)}")
        try:
            return int(answer.raise_for_status().json()["version"])
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"what answers at {url} is no replica; see multiattempt status") from error

    def _dialogue(self, problem: str, gold: list[str] | None) -> None:
        """Run one and show it. Raises ChatError."""
        options = self._options
        seed = random.randrange(2**31) if options.seed is None else options.seed
        body: dict[str, Any] = {"problem": problem, "max_attempts": options.attempts, "seed": seed, "stream": True}
        if gold:
            body["gold"] = gold
        if options.temperature is not None:
            body["sampling"] = {"temperature": options.temperature}
        text = json.dumps(body).encode()  # ASCII: what is no Unicode in the problem is the replica's to clean
        try:
            with self._client.stream(
                "POST", "/v1/dialogues", content=text, headers={"Content-Type": "application/json"}
            ) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    kind = RefusedError if answer.is_client_error else ChatError
                    raise kind(f"the replica refuses the problem: {_detail(answer)}")
                self._show(_events(answer), seed)
        except httpx.TransportError as error:
            raise ChatError(f"the replica is gone: {_why(error)}") from error

    def _show(self, events: Iterator[tuple[str, dict[str, Any]]], seed: int) -> None:
        attempt = max_attempts = 0
        for name, data in events:
            if data.get("attempt", attempt) > attempt:
                attempt = data["attempt"]
                self._write_line(f"attempt {attempt} of {max_attempts}", "bold")
            match name:
                case "prompt":
                    max_attempts = data["max_attempts"]
                case "text":
                    self._write(data["text"])
                case "question":
                    self._judge(data["dialogue"])
                case "verdict":
                    self._verdict(data)
                case "feedback":
                    self._write_line(data["text"].strip(), "dim")
                case "result":
                    self._result(data, seed)
                    return
                case "error":
                    raise ChatError(str(data["detail"]))
        raise ChatError("the replica ended before the dialogue did")

    def _judge(self, name: str) -> None:
        self._end_line()
        while (verdict := VERDICTS.get(_read_verdict().strip().lower())) is None:
            self._write_line("y: right, n: wrong, none: there is no answer", "dim")
        answer = self._client.post(f"/v1/dialogues/{name}/verdict", json={"verdict": verdict})
        if answer.status_code not in (httpx.codes.NO_CONTENT, httpx.codes.NOT_FOUND):  # 404: too late; why comes next
            raise ChatError(_detail(answer))

    def _verdict(self, data: dict[str, Any]) -> None:
        verdict, extracted = data["verdict"], data["extracted"]
        found = "" if extracted is None else f": {extracted}"
        self._write_line(f"{verdict.replace('_', ' ')}{found}", STYLES.get(verdict, "yellow"))

    def _result(self, data: dict[str, Any], seed: int) -> None:
        count = len(data["attempts"])
        versions = ", ".join(str(version) for version in data["weight_versions"])
        self._write_line(
            f"{ENDS[data['finish_reason']]} after {count} attempt{'s' * (count != 1)}, reward {data['reward']:+g}, "
            f"{data['num_tokens']} tokens, {data['seconds']['total']:.1f} s, seed {seed}, weight version {versions}",
            "dim",
        )

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.out(printable(text), end="", style=style, highlight=False)
        self._console.file.flush()
        self._is_line_open = not text.endswith("\n")

    def _write_line(self, text: str, style: str) -> None:
        self._end_line()
        self._write(f"{text}\n", style)

    def _end_line(self) -> None:
        if self._is_line_open:
            self._write("\n")


def printable(text: str) -> str:
    """The text with control characters written out, for a terminal that would obey them; line breaks and tabs stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events, as far as a replica writes them."""
    name = ""
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _read(prompt: str) -> str:
    """A line of standard input. Raises EOFError at its end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` then edits and remembers
        return input(prompt)
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    line = line.rstrip("\r\n")
    print(f"{prompt}{printable(line)}", flush=True)  # so that the output can be read by itself
    return line


def _read_verdict() -> str:
    try:
        return _read("right? [y/n/none] ")
    except EOFError as error:
        raise InputEnded("the input ended where a verdict is wanted; --gold lets the grader judge") from error


def _detail(answer: httpx.Response) -> str:
    try:
        return " ".join(str(answer.json()["detail"]).split())
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def _why(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def _complain(error: ChatError) -> int:
    print(f"multiattempt: error: {printable(str(error))}", file=sys.stderr)
    return EXIT_FAILED
