"""A replica without an engine: real control routes, real gloo, real staging; the "model" is a dict of tensors.

`python stub_replica.py PORT` serves until killed.
"""

import sys
import zlib

import torch
import uvicorn
from fastapi import FastAPI

from services.contracts.weights.protocol import Join, Prepare
from services.contracts.weights.receiver import Receiver
from services.rollout.weight_control import WeightControl, create_router


class DictModel:
    """Stands where vLLM's AsyncLLM stands."""

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "keep" and clear_cache

    async def resume_generation(self):
        pass

    async def update_weight_version(self, version):
        pass


class StubEngine:
    """The worker calls of a transfer, on the real receiver."""

    version = 0
    broken = ""

    def __init__(self):
        self.async_llm, self.weights = DictModel(), {}
        self.receiver = Receiver(torch.device("cpu"), rank=0)

    async def rpc(self, method, kwargs, timeout_s):
        return [getattr(self, method)(**kwargs)]

    def init_weight_transfer_engine(self, init_info):
        self.receiver.join(Join(**init_info["join"]))

    def start_weight_update(self):
        pass

    def update_weights(self, update_info):
        self.receiver.prepare(Prepare(**update_info["prepare"]))

    def finish_weight_update(self):
        self.weights = {name: tensor.clone() for name, tensor in self.receiver.take()}

    def weights_status(self):
        return self.receiver.status()

    def weights_abort(self):
        self.receiver.leave()


engine = StubEngine()
app = FastAPI()
app.include_router(create_router(WeightControl(engine)))


@app.get("/weights")
async def weights():
    crcs = {name: zlib.crc32(memoryview(t.view(torch.uint8).flatten().numpy())) for name, t in engine.weights.items()}
    return {"version": engine.version, "crcs": crcs}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
