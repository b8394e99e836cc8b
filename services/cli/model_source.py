"""What `multiattempt eval MODEL` means by MODEL: a run, one of its checkpoints, a model folder or name, an experiment.

A model out of a run is evaluated in the dialogues it was trained in: prompt, budgets and sampling are that run's.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.contracts.config import ConfigError, RunConfig
from services.learner.checkpoint import BEST

# Of a run's configuration, what says how its dialogues are held and its model is served.
KEPT: Mapping[str, frozenset[str] | None] = {
    "run": frozenset({"seed"}),
    "model": frozenset({"dtype", "fp32_head", "max_model_len"}),
    "data": None,  # whole
    "dialogue": None,
    "sampling": None,
    "rollout": frozenset(
        {"device", "max_num_seqs", "kv_cache_mb", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager"}
    ),
}
CONTEXT = 4096  # of a model whose own is longer, or not known yet
WEIGHTS = ("*.safetensors", "*.bin")
IDENTITY = (*WEIGHTS, "config.json", "tokenizer*", "vocab*", "merges.txt", "chat_template*", "*.model")
CHUNK_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is from. base: settings that come with it; path: empty where the experiment says it."""

    name: str
    path: str = ""
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experiment: Path | None = None  # a TOML file


def find_model(text: str) -> ModelSource:
    """Raises ConfigError when MODEL is nothing of that kind."""
    folder = Path(text).expanduser()
    if folder.suffix == ".toml":
        return ModelSource(folder.stem, experiment=folder)
    if (folder / "hf" / "config.json").is_file():
        return _checkpoint(folder)
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file():
        return _checkpoint(_of_run(folder))
    if (folder / "config.json").is_file():
        if folder.name == "hf" and (folder.parent / "config.json").is_file():
            return _checkpoint(folder.parent)
        return _bare(folder)
    looks_local = folder.is_absolute() or text.startswith((".", "~")) or folder.exists()
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ConfigError(
            f"{text}: no model there; expected a run's folder, a checkpoint, a Hugging Face model (folder or name) "
            f"or an experiment's TOML file"
        )
    return ModelSource(text.rpartition("/")[2], text, {"model": {"max_model_len": CONTEXT}})


def fingerprint(folder: Path) -> str:
    """Of the files that make the model what it is: weights, configuration, tokenizer."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in IDENTITY for path in folder.glob(pattern)}):
        found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                found.update(block)
    return found.hexdigest()[:16]


def check_model_folder(folder: Path) -> None:
    """Raise ConfigError when it has no weights."""
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ConfigError(f"{folder}: no weights there ({' or '.join(WEIGHTS)})")


def dialogue_settings(config: RunConfig) -> dict[str, Any]:
    """What shapes a dialogue beside the model, as an evaluation keeps it."""
    values = config.model_dump(mode="json")
    model = {name: values["model"][name] for name in ("dtype", "fp32_head", "max_model_len")}
    sampling = {name: values["sampling"][name] for name in ("top_p", "top_k")}
    return {**values["dialogue"], **model, **sampling}


def _of_run(run: Path) -> Path:
    """Its best checkpoint, where it keeps one, else the newest."""
    folder = run / "checkpoints"
    whole = sorted(path for path in folder.glob("v*") if (path / "hf" / "config.json").is_file())
    if not whole:
        raise ConfigError(f"{run}: this run has no checkpoint yet")
    best = folder / BEST
    return best.resolve() if best.is_dir() else whole[-1]


def _checkpoint(folder: Path) -> ModelSource:
    folder = folder.resolve()
    name = f"{folder.parents[1].name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = {}
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: not JSON: {error}") from error
    return ModelSource(name, str(folder / "hf"), _kept(values))


def _bare(folder: Path) -> ModelSource:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = int(described.get("max_position_embeddings", CONTEXT))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: no model's configuration: {error}") from error
    return ModelSource(folder.resolve().name, str(folder), {"model": {"max_model_len": min(own, CONTEXT)}})


def _kept(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of KEPT that this release knows."""
    found = {}
    for section, names in KEPT.items():
        known = type(getattr(RunConfig(), section)).model_fields
        wanted = set(known) if names is None else names & set(known)
        found[section] = {name: value for name, value in values.get(section, {}).items() if name in wanted}
    return found
