"""The learner's view of the run as metrics: the ledger's depth, Redis' memory, who is there and who was lost.

The learner exports them because it is the one process of a run that there is exactly once. `look` is called about
once a second and returns what `multiattempt status` and the console show of the learner.
"""

from collections.abc import Callable, Mapping

from prometheus_client import Counter, Gauge
from redis.asyncio import Redis

from services.contracts.ledger import Ledger
from services.contracts.observations import Figure
from services.contracts.registry import Registry
from services.learner.phases import Phases

TASKS = Gauge("multiattempt_ledger_tasks", "Tasks: waiting for a replica, or running on one", ["state"])
TRAJECTORIES = Gauge(
    "multiattempt_ledger_trajectories",
    "Trajectories: ready for the learner, or taken and not yet acknowledged",
    ["state"],
)
DEAD = Gauge("multiattempt_ledger_dead_letters", "Tasks that will not be run again, as far as they are kept")
MEMORY = Gauge("multiattempt_ledger_redis_memory_bytes", "Memory that Redis uses")
REPLICAS = Gauge("multiattempt_registry_replicas", "Replicas in the registry", ["state"])
LOST = Counter("multiattempt_registry_replicas_lost_total", "Replicas that fell silent without having been drained")
BEHIND = Gauge(
    "multiattempt_registry_replica_versions_behind",
    "Versions by which the replica furthest behind is behind the learner",
)


class Observer:
    """version: of the learner's weights. collected: dialogues of the batch being collected, and how many it needs."""

    def __init__(
        self,
        redis: Redis,
        *,
        ledger: Ledger,
        registry: Registry,
        phases: Phases,
        version: Callable[[], int],
        collected: Callable[[], tuple[int, int]],
        trouble: Callable[[], str | None],
    ) -> None:
        self._redis, self._ledger, self._registry, self._phases = redis, ledger, registry, phases
        self._version, self._collected, self._trouble = version, collected, trouble
        self._seen: dict[str, str] = {}  # replica -> state

    async def look(self) -> Mapping[str, Figure]:
        """Move the metrics. Returns the learner's vital signs. Raises RedisError."""
        self._phases.note()
        depth = await self._ledger.depth()
        TASKS.labels("waiting").set(depth.waiting)
        TASKS.labels("running").set(depth.running)
        TRAJECTORIES.labels("ready").set(depth.trajectories_ready)
        TRAJECTORIES.labels("taken").set(depth.trajectories_taken)
        DEAD.set(depth.dead)
        MEMORY.set((await self._redis.info("memory"))["used_memory"])
        await self._look_at_replicas()
        there, wanted = self._collected()
        shares = {f"share_{phase}": share for phase, share in self._phases.shares().items()}
        return {
            "phase": self._phases.current,
            "version": float(self._version()),
            "collected": float(there),
            "wanted": float(wanted),
            "trouble": self._trouble(),
            **shares,
        }

    async def _look_at_replicas(self) -> None:
        replicas = await self._registry.replicas()
        now: dict[str, str] = {replica.replica_id: replica.state for replica in replicas}
        LOST.inc(sum(state != "draining" and name not in now for name, state in self._seen.items()))
        self._seen = now
        for state in ("starting", "ready", "draining"):
            REPLICAS.labels(state).set(sum(found == state for found in now.values()))
        BEHIND.set(max((self._version() - replica.version for replica in replicas), default=0))
