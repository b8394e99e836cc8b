"""Checkpoint folders that are either whole or absent: `checkpoints/v00000008`.

A checkpoint is written under a temporary name, its manifest last, everything is flushed to the disk, and only then
gets its name; one that is removed loses its name first. So whatever moment a process is killed at, what has a name
is whole, and what has none is a leftover, which `tidy` removes at the next start. What is inside (engines,
tokenizer) is the caller's; this module imports no torch.
"""

import difflib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from services.contracts.books import Books
from services.contracts.config import ConfigError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
BEST = "best"  # a link to the checkpoint with the best score
_TEMPORARY = ".partial-"
MARGIN = 1.1  # free space wanted, as a multiple of the estimate

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are intact."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint holds. All randomness is a function of the run's seed and these counters."""

    version: int  # policy updates done
    next_task: int  # the issue counter
    seed: int  # of the run: the state of every random stream follows from it and `version`
    world_size: int  # learner ranks that wrote it
    zero_stage: int
    dtype: str
    books: Books = Books()  # what became of the tasks, through this version
    metric: str = ""  # what `score` is a mean of (`learner.checkpoint_best`); empty: nothing
    score: float | None = None  # over the updates since the checkpoint before; higher is better
    files: dict[str, int] = {}  # relative path -> bytes
    schema: int = SCHEMA_VERSION


class Checkpoints:
    """The checkpoints of one run. folder: made when needed. keep: the newest that stay, beside the best by `metric`."""

    def __init__(self, folder: Path, *, keep: int, metric: str = "") -> None:
        self.folder = folder
        self._keep, self._metric = keep, metric

    def latest(self) -> tuple[Path, Manifest] | None:
        """The newest whole checkpoint, or None. Damaged ones (files missing or cut short) are passed over."""
        for path in reversed(self._finished()):
            manifest = _read(path)
            if manifest is not None:
                return path, manifest
        return None

    def read(self, path: Path) -> Manifest:
        """The manifest of a checkpoint that `latest` found, on this rank or another."""
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)

    def temporary(self, version: int) -> Path:
        """Where a checkpoint is written before it gets its name; the same on every rank."""
        return self.folder / f"{_TEMPORARY}{_name(version)}"

    def tidy(self) -> None:
        """Remove what processes that were killed left behind; for a time when nobody writes."""
        for stale in self.folder.glob(f"{_TEMPORARY}*"):
            if stale.is_symlink():
                stale.unlink()
            else:
                shutil.rmtree(stale)

    def scratch(self, name: str) -> Path:
        """A folder for work on checkpoints, not yet there, that `tidy` removes should its owner be killed."""
        return self.folder / f"{_TEMPORARY}{name}"

    def begin(self, version: int, *, need_bytes: int) -> Path:
        """Make the temporary folder. Raises CheckpointError when the disk has not enough space left."""
        target = self.temporary(version)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            free = shutil.disk_usage(self.folder).free
            if free < MARGIN * need_bytes:
                raise OSError(errno.ENOSPC, f"needs about {need_bytes >> 20} MiB, {free >> 20} MiB are free")
            target.mkdir()
        except OSError as error:
            raise self._failure(version, error) from error
        return target

    def commit(self, manifest: Manifest) -> Path:
        """Give the temporary folder of this version its name, then remove checkpoints beyond `keep`. Returns it."""
        temporary, final = self.temporary(manifest.version), self.folder / _name(manifest.version)
        try:
            sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in _files(temporary)}
            data = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, files=sizes)), indent=1)
            (temporary / MANIFEST).write_bytes(data)
            _flush_tree(temporary)
            if final.exists():  # damaged, or of a run that was set back
                self._remove(final)
            temporary.rename(final)
            _flush(self.folder)
        except OSError as error:
            self.abandon(manifest.version)
            raise self._failure(manifest.version, error) from error
        try:
            self._prune()
        except OSError as error:  # the next one tries again
            log.warning("old checkpoints could not be removed", extra={"error": str(error)})
        return final

    def abandon(self, version: int) -> None:
        """Remove what was written of a checkpoint that failed."""
        shutil.rmtree(self.temporary(version), ignore_errors=True)

    def save(self, manifest: Manifest, write: Callable[[Path], None], *, need_bytes: int = 0) -> Path:
        """begin, `write(temporary folder)`, commit. Raises CheckpointError when the disk refuses.

        An OSError or RuntimeError (torch's, for a failed write) of `write` counts as that.
        """
        target = self.begin(manifest.version, need_bytes=need_bytes)
        try:
            write(target)
        except (OSError, RuntimeError) as error:
            raise self.failed(manifest.version, error) from error
        return self.commit(manifest)

    def failed(self, version: int, error: Exception) -> CheckpointError:
        """Abandon a checkpoint that could not be written; returns what to raise."""
        self.abandon(version)
        return self._failure(version, error)

    def _prune(self) -> None:
        """Keep the newest and the best. Damaged ones do not count, and go."""
        finished = self._finished()
        whole = {path: manifest for path in finished if (manifest := _read(path)) is not None}
        kept = set(list(whole)[-self._keep :])
        scores = {
            path: manifest.score
            for path, manifest in whole.items()
            if self._metric and manifest.metric == self._metric and manifest.score is not None
        }
        if scores:
            best = max(scores, key=lambda path: (scores[path], path.name))
            kept.add(best)
            self._point_at(best)
        for path in finished:
            if path not in kept:
                self._remove(path)

    def _point_at(self, best: Path) -> None:
        link, fresh = self.folder / BEST, self.scratch(BEST)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(best.name)
        if link.is_dir() and not link.is_symlink():  # of a run that was copied by what follows links
            self._remove(link)
        fresh.replace(link)

    def _remove(self, path: Path) -> None:
        nameless = self.scratch(f"old-{path.name}")
        path.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)

    def _finished(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("v*") if path.is_dir())

    def _failure(self, version: int, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CheckpointError(f"checkpoint {version} in {self.folder} was not written ({reason}); earlier ones intact")


def averages(figures: Sequence[Mapping[str, float]], *, wanted: str) -> dict[str, float]:
    """Mean of each figure over the updates that have it.

    wanted: `learner.checkpoint_best`. Raises ConfigError when there is no figure of that name.
    """
    names = {name for update in figures for name in update}
    means = {name: fmean(update[name] for update in figures if name in update) for name in sorted(names)}
    if figures and (name := wanted.removeprefix("-")) and name not in means:
        near = difflib.get_close_matches(name, means, n=1)
        hint = f"did you mean {near[0]}?" if near else "the names are those of metrics.jsonl"
        raise ConfigError(f"learner.checkpoint_best: no figure {name!r}; {hint}")
    return means


def _name(version: int) -> str:
    return f"v{version:08d}"


def _read(path: Path) -> Manifest | None:
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
        whole = all((path / name).stat().st_size == size for name, size in manifest.files.items())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return manifest if whole else None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _flush_tree(folder: Path) -> None:
    for path in [*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
