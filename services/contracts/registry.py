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
    device: str  # "cpu", or "cuda:" and the UUIDs of its GPUs, with commas between
    state: Literal["starting", "ready", "draining"]
    pid: int
    started_at: float  # Unix time, seconds; tells a restarted replica from its predecessor
    fingerprint: str = ""  # of the weights it generates with; empty: those that it started with


class WeightsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version that was published as a file."""

    version: int
    fingerprint: str
    num_bytes: int  # of the tensors
    where: str  # its path, or its http:// URL at the learner


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learner's weights."""

    version: int
    fingerprint: str  # empty: the learner has only begun to publish its first version
    file: WeightsFile | None = None  # the newest there is


_encoder = msgspec.json.Encoder()  # JSON: small, rare, and readable in redis-cli
_decoder = msgspec.json.Decoder(Replica)
_published = msgspec.json.Decoder(Published)


class Registry:
    """One run's registry. redis: from `store.connect`. Methods raise redis.exceptions.RedisError.

    Every command is safe to repeat: it sets, deletes or reads.
    """

    def __init__(self, redis: Redis, *, run: str) -> None:
        self._redis = redis
        self._prefix = f"{run_prefix(run)}replica:"
        self._members = f"{run_prefix(run)}replicas"
        self._weights = f"{run_prefix(run)}weights"

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

    async def publish(self, published: Published) -> None:
        """Tell which weights are the learner's."""
        await self._redis.set(self._weights, _encoder.encode(published))

    async def published(self) -> Published | None:
        """The learner's weights; None before a learner came. Raises WireError."""
        value = cast(bytes | None, await self._redis.get(self._weights))
        try:
            return None if value is None else _published.decode(value)
        except msgspec.MsgspecError as error:
            raise WireError(f"not weights of this version: {error}") from error

    async def version(self) -> int:
        """The learner's current weight version; 0 before it published any."""
        published = await self.published()
        return 0 if published is None else published.version

    def _key(self, replica_id: str) -> str:
        return f"{self._prefix}{replica_id}"


def _decode(value: bytes) -> Replica:
    try:
        return _decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a replica of this version: {error}") from error
