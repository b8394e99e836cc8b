"""A replica without an engine: real control routes, real gloo, real staging; the "model" is a dict of tensors.

`python stub_replica.py PORT` serves until killed.
"""

import asyncio
import sys
import zlib

import torch
import uvicorn
from fastapi import FastAPI

from services.contracts.weights.communicator import join_group
from services.contracts.weights.protocol import Join, Prepare
from services.rollout.weight_control import WeightControl, create_router
from services.rollout.weights import Reception, StagingBuffer


class DictModel:
    """Stands where vLLM's AsyncLLM stands: the weight-transfer calls, and a dict instead of a model."""

    def __init__(self):
        self.weights = {}
        self.staging = StagingBuffer(torch.device("cpu"))
        self.communicator = self.reception = None

    async def init_weight_transfer_engine(self, request):
        join = Join(**request.init_info["join"])
        self.communicator = await asyncio.to_thread(join_group, join, device=torch.device("cpu"))

    async def start_weight_update(self):
        pass

    async def update_weights(self, request):
        plan = Prepare(**request.update_info["prepare"]).plan()
        self.reception = Reception(self.communicator, self.staging, plan)

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "keep" and clear_cache

    async def finish_weight_update(self, version):
        self.weights = {name: tensor.clone() for name, tensor in self.reception.wait()}

    async def resume_generation(self):
        pass


class StubEngine:
    version = 0
    broken = ""

    def __init__(self):
        self.async_llm = DictModel()

    async def rpc(self, method, kwargs, timeout_s):
        model = self.async_llm
        if method == "weights_status":
            reception = model.reception
            state = "receiving" if reception.is_running else "failed" if reception.error else "staged"
            times = {"receive_s": reception.seconds, "digest": reception.digest}
            return [{"state": state, "error": str(reception.error), **times}]
        assert method == "weights_abort"
        if model.communicator is not None:
            model.communicator.close()
        if model.reception is not None and model.reception.is_running:
            model.staging = StagingBuffer(torch.device("cpu"))
        model.communicator = model.reception = None
        return [None]


engine = StubEngine()
app = FastAPI()
app.include_router(create_router(WeightControl(engine)))


@app.get("/weights")
async def weights():
    crcs = {
        name: zlib.crc32(memoryview(t.view(torch.uint8).flatten().numpy()))
        for name, t in engine.async_llm.weights.items()
    }
    return {"version": engine.version, "crcs": crcs}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
