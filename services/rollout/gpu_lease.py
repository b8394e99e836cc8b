"""Which GPUs a replica uses: it leases free ones in Redis, so that no two replicas share one.

For `docker compose up --scale rollout=4`, where every container sees all GPUs. A GPU is known by its UUID, which is
the same in every container of its host and nowhere else, so the host needs no name. CUDA_VISIBLE_DEVICES set to just
as many as are needed is the user's own choice, and nothing is leased.

A thread renews the lease, because the event loop stands still while a model is loaded. A replica that cannot renew
for three quarters of a lease, or finds its GPU in other hands, ends at once: it never shares one. Nothing here
touches CUDA; it runs before vLLM is imported.
"""

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import cast

from redis import Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from services.contracts.config import ConfigError, RunConfig
from services.rollout.ending import end_at_once

VARIABLE = "CUDA_VISIBLE_DEVICES"
LEASE_S = 40.0  # three quarters of it outlast a restart of Redis as the ledger waits for it (store.PATIENCE_S)
POLL_S = 0.5  # between looks for a free GPU
LIST_TIMEOUT_S = 30.0
CONNECT_TRIES = 6
EXIT_LOST = 1

# KEYS one of each GPU   ARGV owner, holder, how many, lease_ms.   Returns the indices leased, or none.
# The owner's own come first: those of an earlier life of it, or of a reply that was lost, so it is safe to repeat.
_CLAIM = """
local chosen = {}
for _, wanted in ipairs({ 'own', 'free' }) do
  for i, key in ipairs(KEYS) do
    local holder = redis.call('GET', key)
    local kind = not holder and 'free' or string.sub(holder, 1, #ARGV[1]) == ARGV[1] and 'own'
    if kind == wanted and #chosen < tonumber(ARGV[3]) then
      table.insert(chosen, i)
    end
  end
end
if #chosen < tonumber(ARGV[3]) then
  return {}
end
for _, i in ipairs(chosen) do
  redis.call('SET', KEYS[i], ARGV[2], 'PX', ARGV[4])
end
return chosen
"""
# KEYS those leased   ARGV holder, lease_ms.   Returns 1 while all are ours; one that nobody holds becomes ours again.
_RENEW = """
for _, key in ipairs(KEYS) do
  if (redis.call('GET', key) or ARGV[1]) ~= ARGV[1] then
    return 0
  end
end
for _, key in ipairs(KEYS) do
  redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
end
return 1
"""
# KEYS those leased   ARGV holder
_RELEASE = """
for _, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[1] then
    redis.call('DEL', key)
  end
end
return 0
"""

log = logging.getLogger(__name__)


def installed_gpus() -> list[str]:
    """UUIDs of the GPUs that this host, or container, has; in the order of CUDA's PCI_BUS_ID."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=False)
    except (FileNotFoundError, PermissionError):
        return []
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"nvidia-smi does not answer within {LIST_TIMEOUT_S:g} s: the GPU driver hangs") from error
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def pool(named: str | None, count: int, list_gpus: Callable[[], Sequence[str]]) -> list[str]:
    """The GPUs to lease `count` of; empty where nothing is to be leased. named: CUDA_VISIBLE_DEVICES.

    Raises ConfigError when there are fewer than `count`.
    """
    if named is None:
        gpus = list(list_gpus())
    else:
        names = [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
        if len(names) == count or not names:
            return []
        installed = list(list_gpus()) if any(name.isdigit() for name in names) else []
        gpus = [installed[int(name)] if name.isdigit() and int(name) < len(installed) else name for name in names]
    if 0 < len(gpus) < count:
        raise ConfigError(f"rollout.tensor_parallel_size is {count}, but only {len(gpus)} GPUs are visible")
    return gpus


class GpuLease:
    """`count` GPUs out of `gpus`, held from `acquire` to `release`.

    owner: what stays the same when the replica is started again; it then takes its own GPUs over at once.
    on_lost: called in the renewing thread, with the reason, when the GPUs may be another's.
    """

    def __init__(
        self,
        url: str,
        gpus: Sequence[str],
        count: int,
        *,
        owner: str,
        on_lost: Callable[[str], object],
        lease_s: float = LEASE_S,
    ) -> None:
        self._gpus, self._count, self._lease_s, self._on_lost = list(gpus), count, lease_s, on_lost
        self._owner = f"{owner} "
        self._holder = f"{self._owner}{os.getpid()} {secrets.token_hex(4)}"
        timeout_s = lease_s / 20
        patient = Retry(ExponentialBackoff(cap=1.0, base=0.05), CONNECT_TRIES)
        self._redis = Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=2.0, retry=patient)
        self._beating = Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._held: list[str] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait_s: float) -> list[str]:
        """Lease the GPUs; waits up to `wait_s` seconds for free ones. Raises ConfigError in one line."""
        deadline, has_told = time.monotonic() + wait_s, False
        try:
            while not (chosen := self._claim()):
                trouble = self._trouble()
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{trouble}, and none became free within {wait_s:g} s (rollout.gpu_wait_s): start fewer "
                        f"replicas, or name GPUs in {VARIABLE} to share them"
                    )
                if not has_told:
                    log.warning("waiting for a free GPU", extra={"reason": trouble, "wait_s": wait_s})
                    has_told = True
                time.sleep(min(POLL_S, self._lease_s / 4))
        except RedisError as error:
            raise ConfigError(f"redis.url: no GPU can be leased: {error}") from error
        self._held = [self._gpus[index - 1] for index in chosen]
        log.info("GPUs leased", extra={"gpus": self._held})
        self._thread = threading.Thread(target=self._renew_on, args=(time.monotonic(),), name="gpu-lease", daemon=True)
        self._thread.start()
        return self._held

    def release(self) -> None:
        """Give the GPUs back. Without a server they become free when the lease runs out."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(self._lease_s)
        with contextlib.suppress(RedisError):
            self._beating.eval(_RELEASE, len(self._held), *self._keys(self._held), self._holder)
        self._redis.close()
        self._beating.close()

    def _claim(self) -> list[int]:
        keys, lease_ms = self._keys(self._gpus), round(self._lease_s * 1000)
        found = self._redis.eval(_CLAIM, len(keys), *keys, self._owner, self._holder, str(self._count), str(lease_ms))
        return cast(list[int], found)

    def _trouble(self) -> str:
        holders = cast(list[bytes | None], self._redis.mget(self._keys(self._gpus)))
        names = sorted({holder.decode().rsplit(" ", 2)[0] for holder in holders if holder is not None})
        return f"{self._count} GPUs wanted, {len(self._gpus)} visible, {', '.join(names)} hold them"

    def _renew_on(self, renewed: float) -> None:
        pause_s = self._lease_s / 8
        while not self._is_over.wait(pause_s):
            asked = time.monotonic()
            try:
                keys = self._keys(self._held)
                is_ours = self._beating.eval(_RENEW, len(keys), *keys, self._holder, str(round(self._lease_s * 1000)))
            except RedisError as error:
                if time.monotonic() - renewed > self._lease_s * 3 / 4:
                    return self._lose(f"not renewed for {time.monotonic() - renewed:.0f} s: {error}")
                pause_s = self._lease_s / 40
                continue
            if not is_ours:
                return self._lose("another replica holds it")
            renewed, pause_s = asked, self._lease_s / 8

    def _lose(self, reason: str) -> None:
        if not self._is_over.is_set():
            self._on_lost(f"the lease of GPU {', '.join(self._held)} is lost: {reason}")

    @staticmethod
    def _keys(gpus: Sequence[str]) -> list[str]:
        """Of all runs together; the braces keep them in one slot of a cluster."""
        return [f"ma:{{gpus}}:{gpu}" for gpu in gpus]


@contextlib.contextmanager
def leased_gpus(
    config: RunConfig,
    replica_id: str,
    *,
    environ: MutableMapping[str, str] = os.environ,
    list_gpus: Callable[[], Sequence[str]] = installed_gpus,
    lease_s: float = LEASE_S,
) -> Iterator[None]:
    """Hold the GPUs that this replica needs, named in CUDA_VISIBLE_DEVICES; nothing where there is none to choose.

    Raises ConfigError in one line.
    """
    settings = config.rollout
    count = settings.tensor_parallel_size
    gpus = pool(environ.get(VARIABLE), count, list_gpus) if settings.device != "cpu" else []
    if not gpus:
        yield
        return
    owner = f"{config.run.name}/{replica_id}@{socket.gethostname()}"
    lease = GpuLease(
        config.redis.url, gpus, count, owner=owner, on_lost=lambda why: end_at_once(EXIT_LOST, why), lease_s=lease_s
    )
    try:
        environ[VARIABLE] = ",".join(lease.acquire(settings.gpu_wait_s))
        yield
    finally:
        lease.release()
