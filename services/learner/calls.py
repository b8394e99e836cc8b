"""Control calls to replicas, and waiting for a group's calls together with the learner's own part in it."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import Any

import httpx

from services.contracts.registry import Replica
from services.contracts.weights.communicator import TransferError
from services.contracts.weights.protocol import Abort, Commit, Join, Prepare

BLAMELESS = 424  # the group failed, and the replica saw no fault of its own


class SourceError(TransferError):
    """The weights did not come out of the training engine in time; no replica's fault."""


class NoAnswerError(TransferError):
    """A replica is not there, or says nothing."""


class RefusalError(TransferError):
    """A replica answered that a step failed."""

    def __init__(self, reason: str, *, is_blameless: bool) -> None:
        super().__init__(reason)
        self.is_blameless = is_blameless


class GroupFailedError(Exception):
    """A group could not serve its members.

    silent: did not answer, with reasons. guilty: answered that they failed themselves. Both empty: any may be to blame.
    """

    def __init__(self, failed: dict[str, TransferError], *, cause: TransferError | None = None) -> None:
        super().__init__(str(failed or cause))
        self.silent = {name: str(error) for name, error in failed.items() if isinstance(error, NoAnswerError)}
        self.guilty = {
            name: str(error)
            for name, error in failed.items()
            if isinstance(error, RefusalError) and not error.is_blameless
        }
        self.is_our_own = isinstance(cause, SourceError)

    @property
    def why(self) -> str:
        """For the metric."""
        if self.is_our_own:
            return "packing"
        reasons = " ".join(self.guilty.values())
        return "mismatch" if "MismatchError" in reasons else "refused" if reasons else "broken"


class Calls:
    """Control calls over HTTP, each with a deadline of its own. token: of /control; empty: none."""

    def __init__(self, client: httpx.AsyncClient, *, token: str) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def post(
        self, replica: Replica, step: str, message: Join | Prepare | Commit | Abort, timeout_s: float
    ) -> dict[str, Any]:
        """One call. Raises NoAnswerError; RefusalError with the replica's own words."""
        url = f"{replica.url}/control/weights/{step}"
        try:
            async with asyncio.timeout(timeout_s):  # httpx's own is between two bytes
                response = await self._client.post(
                    url, json=message.model_dump(), headers=self._headers, timeout=timeout_s
                )
        except (httpx.HTTPError, TimeoutError) as error:
            raise NoAnswerError(f"{step}: no answer from {replica.url}: {error!r}") from error
        if not response.is_success:
            reason = f"{step}: {response.status_code} {response.text[:300]}"
            raise RefusalError(reason, is_blameless=response.status_code == BLAMELESS)
        answer: dict[str, Any] = response.json()
        return answer

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


async def settle(
    sender: asyncio.Task[Any],
    calls: Mapping[str, Coroutine[Any, Any, dict[str, Any]]],
    *,
    cancelled: threading.Event,
    grace_s: float,
) -> tuple[dict[str, TransferError], TransferError | None]:
    """Wait for the learner's part and all calls. Why calls failed, by replica; and why the learner's part did.

    When one fails, `cancelled` is set for the learner's part, and the other replicas, woken by the end of the group,
    have `grace_s` left to answer. What is no transfer error is a bug, and raised.
    """
    tasks = {name: asyncio.create_task(call) for name, call in calls.items()}
    try:
        await asyncio.wait([sender, *tasks.values()], return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in (sender, *tasks.values())):
            cancelled.set()
            await asyncio.wait([sender])  # bounded: each step of it has a deadline
            await asyncio.wait(tasks.values(), timeout=grace_s)
    finally:
        for task in tasks.values():
            task.cancel()
        outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
    failed: dict[str, TransferError] = {}
    for name, outcome in zip(tasks, outcomes, strict=True):
        if isinstance(outcome, asyncio.CancelledError):
            failed[name] = NoAnswerError(f"no answer within {grace_s:g} s of the group's end")
        elif isinstance(outcome, TransferError):
            failed[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
    cause = sender.exception()
    if cause is not None and not isinstance(cause, TransferError):
        raise cause
    return failed, cause
