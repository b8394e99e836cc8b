"""Do weights travel between two processes of this machine? What `multiattempt doctor --gpu` runs by itself.

Sender and receiver are two processes, as learner and replica are, and use the code of a real transfer. A version must
arrive whole. Then the receiver falls silent, which the sender must notice within its deadline (NCCL itself says
nothing), and afterwards a new group must serve the two again. Prints a line of JSON for each finding: check, good,
result, remedy.

    python -m services.contracts.weights.probe nccl cuda --peer-gpu 1
    python -m services.contracts.weights.probe gloo cpu --mb 8
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import torch

from services.contracts.weights.communicator import MismatchError, TransferError, join_group, open_store
from services.contracts.weights.fingerprint import fingerprint, share
from services.contracts.weights.plan import TensorSpec
from services.contracts.weights.protocol import Join, Prepare, Transport
from services.contracts.weights.receiver import Receiver
from services.contracts.weights.staging import Arena, send

HOST, CPU = "127.0.0.1", torch.device("cpu")
FORM_S = 60.0  # for a group to form: the first one loads libraries
BUCKET_S = 20.0  # deadline of a bucket
SILENT_S = 2.0  # the same where it is meant to run out
NOTICE_S = 10.0  # beyond it, until the sender must have given up
BUCKET_BYTES = 16 << 20
POLL_S = 0.002

Finding = tuple[str, bool, str, str]


class Sender:
    """This end, and the receiver's process. peer_gpu: what that process shall see, as CUDA_VISIBLE_DEVICES has it."""

    def __init__(self, transport: Transport, device: torch.device, *, num_bytes: int, peer_gpu: str) -> None:
        self._transport, self._device, self._generation = transport, device, 0
        spec = TensorSpec("weights", "bfloat16", (num_bytes // 2,))
        self._prepare = Prepare(
            generation=0,
            version=1,
            names=[spec.name],
            dtypes=[spec.dtype],
            shapes=[list(spec.shape)],
            bucket_bytes=BUCKET_BYTES,
            deadline_s=FORM_S + BUCKET_S,
        )
        self._arena = Arena(device if transport == "nccl" else CPU)
        self._arena.reserve(num_bytes)
        self._arena.data.copy_(torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the transfer has a stream of its own
        command = [sys.executable, "-m", "services.contracts.weights.probe", transport, device.type, "--receive"]
        seen = {"CUDA_VISIBLE_DEVICES": peer_gpu} if peer_gpu else {}
        self._receiver = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **seen}
        )

    def close(self) -> None:
        """End the receiver."""
        self._receiver.kill()
        self._receiver.wait()

    def transfer(self, times: int, *, bucket_s: float = BUCKET_S) -> float:
        """A new group, and the version through it so often. Seconds of the last time. Raises TransferError.

        times: with 0 the receiver joins the group and then does nothing.
        """
        self._generation += 1
        store = open_store(HOST, timeout_s=FORM_S)
        join = Join(
            generation=self._generation,
            host=HOST,
            port=store.port,
            rank=0,
            world_size=2,
            transport=self._transport,
            nccl_id=_nccl_id() if self._transport == "nccl" else None,
            rendezvous_s=FORM_S,
            bucket_s=bucket_s,
        )
        prepare = self._prepare.model_copy(update={"generation": self._generation})
        order = {"join": join.model_copy(update={"rank": 1}).model_dump(), "prepare": prepare.model_dump()}
        assert self._receiver.stdin is not None and self._receiver.stdout is not None
        self._receiver.stdin.write(json.dumps(order | {"times": times}) + "\n")
        self._receiver.stdin.flush()
        communicator, seconds = join_group(join, device=self._device, store=store), 0.0
        try:
            for _ in range(max(1, times)):
                started = time.monotonic()
                shares = send(self._arena, communicator, prepare.plan(), known=(), before=lambda _: None)
                seconds = time.monotonic() - started
        finally:
            answer = self._receiver.stdout.readline()  # it has deadlines of its own
            communicator.close()
        told = json.loads(answer or '{"error": "the receiver ended"}')
        if told["error"]:
            raise TransferError(told["error"])
        if {*told["fingerprints"], fingerprint(shares)} != {fingerprint(shares)}:
            raise MismatchError(f"fingerprints differ: sent {fingerprint(shares)}, there {told['fingerprints']}")
        return seconds


def receive(device: torch.device, orders: Iterable[str], answers: TextIO) -> None:
    """The receiver's process: do as told, a line each."""
    receiver = Receiver(device, rank=0)
    for line in orders:
        order: dict[str, Any] = json.loads(line)
        receiver.join(Join(**order["join"]))
        status, fingerprints = _until(receiver, "joined"), set[str]()
        for _ in range(order["times"]):
            if status["state"] == "failed":
                break
            receiver.prepare(Prepare(**order["prepare"]))
            status = _until(receiver, "staged")
            if status["state"] == "staged":
                [(_, weights)] = receiver.take()
                for place in (CPU, device):  # a fingerprint is the same wherever it is computed
                    fingerprints.add(fingerprint([int(share(weights.view(torch.uint8).to(place), 0))]))
        answers.write(json.dumps({"error": status["error"], "fingerprints": sorted(fingerprints)}) + "\n")
        answers.flush()


def findings(sender: Sender, transport: Transport, *, num_bytes: int) -> Iterator[Finding]:
    """What comes of it, up to the first failure."""
    where = "NCCL" if transport == "nccl" else "gloo"
    remedy = (
        'run again with NCCL_DEBUG=INFO in the environment; weights.transport = "gloo" does without NCCL'
        if transport == "nccl"
        else "processes of this machine must reach one another on 127.0.0.1"
    )
    check = f"{where}: transfer"
    try:
        seconds = sender.transfer(2)
        rate = f"{num_bytes / 1e9 / seconds:.1f} GB/s"
        yield (
            check,
            True,
            f"{num_bytes >> 20} MiB at {rate}, the same fingerprint at both ends{_library(transport)}",
            "",
        )
        check = f"{where}: silent peer"
        yield _silence(sender, check, remedy)
        check = f"{where}: new group"
        started = time.monotonic()
        sender.transfer(1)
        yield check, True, f"serves again after that ({time.monotonic() - started:.1f} s)", ""
    except TransferError as error:
        yield check, False, str(error), remedy


def _silence(sender: Sender, check: str, remedy: str) -> Finding:
    started = time.monotonic()
    try:
        sender.transfer(0, bucket_s=SILENT_S)
    except TransferError:
        seconds = time.monotonic() - started
        return check, seconds < SILENT_S + NOTICE_S, f"noticed after {seconds:.1f} s (deadline {SILENT_S:g} s)", remedy
    return check, False, "not noticed", remedy


def _until(receiver: Receiver, state: str) -> dict[str, Any]:
    while (status := receiver.status())["state"] not in (state, "failed"):  # its steps have deadlines
        time.sleep(POLL_S)
    return status


def _nccl_id() -> str:
    from services.contracts.weights.nccl import make_nccl_id

    return make_nccl_id()


def _library(transport: Transport) -> str:
    if transport == "gloo":
        return ""
    from services.contracts.weights.nccl import nccl_version

    return f"; vLLM's NCCL {nccl_version()}"


def main() -> None:
    """Run either end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transport", choices=("nccl", "gloo"))
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--peer-gpu", default="")
    parser.add_argument("--receive", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # it would log to where the findings go
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    if arguments.receive:
        receive(device, sys.stdin, sys.stdout)
        return
    num_bytes = arguments.mb << 20
    sender = Sender(arguments.transport, device, num_bytes=num_bytes, peer_gpu=arguments.peer_gpu)
    try:
        for finding in findings(sender, arguments.transport, num_bytes=num_bytes):
            sys.stdout.write(json.dumps(finding) + "\n")
            sys.stdout.flush()
    finally:
        sender.close()


if __name__ == "__main__":
    main()
