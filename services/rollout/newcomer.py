"""A replica that has just started: where it has its weights from, and from when on it may take tasks.

It may once its weights are those of the learner: delivered by it, or out of its newest file and with the fingerprint
that the registry tells now. Where no learner has ever come there is nothing to compare with, and no reason to wait.
"""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

import httpx
from fastapi import HTTPException

from services.contracts.config import RunConfig
from services.contracts.registry import Published, Registry, WeightsFile
from services.contracts.weights.protocol import Commit, Patience
from services.rollout.weight_control import WeightControl

log = logging.getLogger(__name__)


class Newcomer:
    """Of one replica. `look` after each heartbeat: whoever is announced is either delivered to, or sees the record."""

    def __init__(self, config: RunConfig, registry: Registry, weights: WeightControl) -> None:
        self._settings, self._token = config.weights, config.rollout.control_token
        self._registry, self._weights = registry, weights
        self._patience = Patience(self._settings.timeout_s, self._settings.min_mb_per_s * 1e6)
        self._is_admitted = False

    @property
    def may_claim(self) -> bool:
        """Whether the replica may take tasks."""
        return self._is_admitted or self._weights.is_delivered

    async def look(self) -> None:
        """Compare with what the learner tells now, as long as that is of interest. Raises RedisError, WireError."""
        if not self._weights.is_delivered:
            self._is_admitted = self._is_learners(await self._registry.published())

    async def load_file(self) -> None:
        """Load the newest published file, where that is configured and there is one; else a transfer will come."""
        published = await self._registry.published()
        if self._settings.newcomers == "sync" or published is None or published.file is None:
            return
        started, file = time.monotonic(), published.file
        commit = Commit(
            generation=0,
            version=file.version,
            mode="keep",
            fingerprint=file.fingerprint,
            drain_s=self._patience.of(0),
            load_s=self._patience.of(file.num_bytes),
        )
        try:
            async with self._local(file) as path:
                await self._weights.load_file(path, commit, num_bytes=file.num_bytes)
        except (OSError, httpx.HTTPError, HTTPException) as error:
            log.warning(
                "no weights from a file; waiting for a transfer", extra={"file": file.where, "error": repr(error)}
            )
        else:
            seconds = round(time.monotonic() - started, 2)
            log.info("weights from a file", extra={"version": file.version, "seconds": seconds, "file": file.where})

    def _is_learners(self, published: Published | None) -> bool:
        if published is None:
            return True
        own = (self._weights.version, self._weights.fingerprint)
        return bool(published.fingerprint) and own == (published.version, published.fingerprint)

    @contextlib.asynccontextmanager
    async def _local(self, file: WeightsFile) -> AsyncIterator[Path]:
        """The file's path here, downloaded if the learner serves it. Raises OSError (deadlines), HTTPError."""
        if not file.where.startswith("http://"):
            folder = self._settings.folder
            yield folder / PurePosixPath(file.where).name if str(folder) != "." else Path(file.where)
            return
        deadline_s = self._patience.of(file.num_bytes)
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as target:
            async with asyncio.timeout(deadline_s), httpx.AsyncClient(timeout=deadline_s) as client:
                headers = {"Authorization": f"Bearer {self._token}"}
                async with client.stream("GET", file.where, headers=headers) as response:
                    response.raise_for_status()
                    async for part in response.aiter_bytes(1 << 20):
                        target.write(part)
            target.flush()
            yield Path(target.name)
