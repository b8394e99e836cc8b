"""A replica for `benchmarks.sync`: the real end of a weight transfer, on vLLM or on a dict of tensors.

`python -m benchmarks.sync_replica PORT CONFIG MODEL` has an engine, with PORT alone there is none. Beside the control
routes: `POST /raw` receives bare buckets; `POST /generate` keeps requests in flight and tells when each token came.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from services.contracts.config import load_resolved
from services.contracts.weights.communicator import GlooCommunicator, join_group, meet
from services.contracts.weights.protocol import Join
from services.contracts.wire import Sampling
from services.rollout.weight_control import WeightControl, create_router
from tests.transfers import DictEngine


class RealNetwork:
    """Where `DictEngine` would have a network in memory."""

    def enter(self, join: Join, *, device: torch.device, name: str) -> Any:
        return join_group(join, device=device)


class RawReceiver:
    """Receives buckets and does nothing with them."""

    def __init__(self) -> None:
        self._link: GlooCommunicator | None = None
        self._buffer = torch.zeros(0, dtype=torch.uint8)

    def close(self) -> None:
        """Be ready for another group."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def receive(self, join: Join, num_bytes: int, bucket_bytes: int, depth: int) -> None:
        if self._link is None:
            self._link = GlooCommunicator(meet(join), join=join)
            self._buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        flying = []
        for start in range(0, num_bytes, bucket_bytes):
            flying.append(self._link.start(self._buffer[start : start + bucket_bytes]))
            if len(flying) > depth:
                flying.pop(0).wait()
        for one in flying:
            one.wait()


async def token_times(engine: Any, num_requests: int, num_prompt: int, num_tokens: int) -> list[list[float]]:
    """When each request's tokens came, on the monotonic clock that all processes share."""
    nothing: dict[str, Any] = {"sampling": Sampling(), "stop_ids": frozenset()}

    async def one(number: int) -> list[float]:
        times: list[float] = []

        def note(_: int) -> bool:
            times.append(time.monotonic())
            return False

        prompt = [(7 * number + i) % 50 + 1 for i in range(num_prompt)]
        while len(times) < num_tokens:
            await engine.sample(prompt, max_tokens=num_tokens - len(times), seed=number, is_last=note, **nothing)
        return times

    return await asyncio.gather(*(one(number) for number in range(num_requests)))


async def main(port: int, config: str | None, model: str | None) -> None:
    engine: Any = DictEngine(RealNetwork(), "replica")  # type: ignore[arg-type]
    if config is not None and model is not None:
        from services.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(load_resolved(Path(config)), Path(model))
        await engine.start()
    app, raw, control = FastAPI(), RawReceiver(), WeightControl(engine)
    app.include_router(create_router(control))

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        return {"fingerprint_s": control._staged.get("fingerprint_s", 0.0)}

    @app.get("/swaps")
    async def swaps() -> list[dict[str, float]]:
        return [{"pause_s": s.pause_s, "swap_s": s.swap_s, "receive_s": s.receive_s} for s in control.history]

    @app.post("/raw")
    async def receive_raw(body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.to_thread(raw.receive, Join(**body["join"]), body["num_bytes"], body["bucket"], body["depth"])
        return {}

    @app.post("/reset")
    async def reset() -> dict[str, Any]:
        raw.close()
        return {}

    @app.post("/generate")
    async def generate(body: dict[str, int]) -> list[list[float]]:
        return await token_times(engine, body["requests"], body["prompt"], body["tokens"])

    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *(sys.argv[2:] or (None, None))))
