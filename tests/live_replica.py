"""A replica's HTTP service over an engine that says what a script has, in a thread of its own, on a free port.

Everything but the engine is real: routes, dialogue runner, tokenizer, and the grader where a test names one.
"""

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fakes import MemoryLedger, speak

from services.contracts.config import RunConfig, load
from services.contracts.wire import Sampling
from services.grader.client import GraderClient
from services.learner.arithmetic_model import build_tokenizer
from services.rollout.app import create_app
from services.rollout.environment import Grader
from services.rollout.replica import ReplicaProcess
from services.rollout.runner import Completion, DialogueRunner
from services.rollout.worker import Worker

TOKEN = "secret"
START_S = STOP_S = 20.0
FLAGS = ("--run.name=live", f"--rollout.control_token={TOKEN}", "--dialogue.system_prompt=You have {attempts}")


class ScriptedEngine:
    """The first attempt of a dialogue with seed 0 says the script's first text, the second the second, in a circle;
    with seed 1 the dialogue begins at the second. None: an attempt that never ends.

    Weight transfers and pauses succeed at once; scores are -1, -2, ...
    """

    def __init__(self, script: Sequence[str | None]) -> None:
        self.version, self.broken, self.device = 0, "", "cpu"
        self.tokenizer = build_tokenizer()
        self.num_endless = 0
        self.transfer = "idle"
        self.samplings: list[Sampling] = []
        self.seeds: list[int] = []
        self.async_llm: Any = ScriptedLLM()
        self._script = script

    async def sample(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        is_last: Callable[[int], bool],
    ) -> Completion:
        self.samplings.append(sampling)
        self.seeds.append(seed)
        text = self._script[seed % len(self._script)]
        if text is None:
            await self._speak_for_ever(is_last)
        said = [*self.tokenizer.encode(text, add_special_tokens=False), min(stop_ids)]
        return await speak(said[:max_tokens], stop_ids, is_last)

    async def _speak_for_ever(self, is_last: Callable[[int], bool]) -> NoReturn:
        """The same token again and again, counted among those that speak until it is given up."""
        [token] = self.tokenizer.encode("x", add_special_tokens=False)
        self.num_endless += 1
        try:
            while True:
                await asyncio.sleep(0.005)
                is_last(token)
        finally:
            self.num_endless -= 1

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        if len(token_ids) >= 1024:
            raise ValueError("longer than the context")
        return [math.nan, *(-float(i) for i in range(1, len(token_ids)))]

    async def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        self.transfer = {"init_weight_transfer_engine": "joined", "update_weights": "staged"}.get(method, self.transfer)
        times = {"receive_s": 0.25, "fingerprint_s": 0.01}
        return [{"state": self.transfer, "fingerprint": "c0ffee", "error": "", "kind": "", **times}]


class ScriptedLLM:
    """The part of vLLM's engine that control routes call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def done(*_: Any, **__: Any) -> None:
            await asyncio.sleep(0)

        return done


def scripted_replica(config: RunConfig, *, engine: Any, grader: Grader) -> ReplicaProcess:
    """A replica that is ready, without a ledger and a real engine. Make it where its event loop runs."""
    replica = ReplicaProcess(config, model=Path("nowhere"), replica_id="rollout-0", url="http://replica")
    replica.engine = engine
    tokenizer = build_tokenizer()
    replica.runner = DialogueRunner(config, engine=engine, grader=grader, tokenizer=tokenizer, replica_id="rollout-0")
    replica.worker = Worker(
        MemoryLedger(),
        replica.runner,
        replica_id="rollout-0",
        version=lambda: engine.version,
        free_places=lambda in_flight, _: 4 - in_flight,
        lease_s=30,
        grader_timeout_s=5,
    )
    replica.trouble = None
    return replica


@dataclass(frozen=True)
class LiveReplica:
    """A replica that answers at `url`."""

    url: str
    replica: ReplicaProcess
    engine: ScriptedEngine
    loop: asyncio.AbstractEventLoop

    def end(self) -> None:
        """What the process does last: it says that it stops."""
        self.loop.call_soon_threadsafe(self.replica.done.set)


@contextlib.contextmanager
def live_replica(
    script: Sequence[str | None], *, grader_url: str = "http://127.0.0.1:9", flags: Sequence[str] = (), **app: Any
) -> Iterator[LiveReplica]:
    """Serve one until the block ends. flags: settings; app: further arguments of `create_app`."""
    config = load(None, [*FLAGS, *flags], env={})
    started: list[LiveReplica] = []
    is_up = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve(listener: socket.socket) -> None:
        engine = ScriptedEngine(script)
        async with GraderClient(grader_url, deadline_s=2.0) as grader:
            replica = scripted_replica(config, engine=engine, grader=grader)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            started.append(LiveReplica(url, replica, engine, asyncio.get_running_loop()))
            settings = uvicorn.Config(
                create_app(replica, **app), log_config=None, access_log=False, lifespan="off",
                timeout_graceful_shutdown=1,
            )  # fmt: skip
            servers.append(uvicorn.Server(settings))
            is_up.set()
            await servers[0].serve([listener])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)), name="replica")
        thread.start()
        try:
            assert is_up.wait(START_S), "the replica did not start"
            yield started[0]
        finally:
            for server in servers:
                server.should_exit = True
            thread.join(STOP_S)
            assert not thread.is_alive(), "the replica did not stop"
