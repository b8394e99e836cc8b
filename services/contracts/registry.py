"""Who is there: the rollout replicas that are alive, where, with which weights; and the learner's version.

A replica announces itself every heartbeat with an expiry, so one that dies disappears by itself. Deciding whom to
send weights to is the learner's (`learner/publish.py`).
"""

from typing import Literal, cast

import msgspec
from redis.asyncio import Redis

from services.contracts.ledger import run_prefix
from services.contracts.wire import WireError


class Replica(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rollout replica, as it describes itself."""

    replica_id: str
    url: str  # base URL of its HTTP service, control routes included
    world_size: int  # processes of its engine that take part in a weight transfer
    version: int  # weights it generates with
    device: str  # "cpu", or "cuda:" and the GPU's UUID
    state: Literal["starting", "ready", "draining"]
    pid: int
    started_at: float  # Unix time, seconds; tells a restarted replica from its predecessor


_encoder = msgspec.json.Encoder()  # JSON: small, rare, and readable in redis-cli
_decoder = msgspec.json.Decoder(Replica)


class Registry:
    """One run's registry. redis: from `store.connect`. Methods raise redis.exceptions.RedisError.

    Every command is safe to repeat: it sets, deletes or reads.
    """

    def __init__(self, redis: Redis, *, run: str) -> None:
        self._redis = redis
        self._prefix = f"{run_prefix(run)}replica:"
        self._members = f"{run_prefix(run)}replicas"
        self._version = f"{run_prefix(run)}version"

    async def announce(self, replica: Replica, ttl_s: float) -> None:
        """Say that the replica is alive for the next `ttl_s` seconds; replaces what it said before."""
        await self._redis.set(self._key(replica.replica_id), _encoder.encode(replica), px=max(1, round(ttl_s * 1000)))
        await self._redis.sadd(self._members, replica.replica_id)  # spares readers a scan of all keys

    async def withdraw(self, replica_id: str) -> None:
        """Leave at once. Does nothing for a replica that is not there."""
        await self._redis.delete(self._key(replica_id))
        await self._redis.srem(self._members, replica_id)

    async def replicas(self) -> list[Replica]:
        """The replicas alive now, sorted by id. Raises WireError for one that another version of the code wrote."""
        names = sorted(name.decode() for name in cast(set[bytes], await self._redis.smembers(self._members)))
        if not names:
            return []
        values = cast(list[bytes | None], await self._redis.mget([self._key(name) for name in names]))
        if expired := [name for name, value in zip(names, values, strict=True) if value is None]:
            await self._redis.srem(self._members, *expired)  # one that is back by now adds itself at its next heartbeat
        return [_decode(value) for value in values if value is not None]

    async def set_version(self, version: int) -> None:
        """Publish the learner's current weight version."""
        await self._redis.set(self._version, version)

    async def version(self) -> int:
        """The learner's current weight version; 0 before it published any."""
        return int(await self._redis.get(self._version) or 0)

    def _key(self, replica_id: str) -> str:
        return f"{self._prefix}{replica_id}"


def _decode(value: bytes) -> Replica:
    try:
        return _decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a replica of this version: {error}") from error
