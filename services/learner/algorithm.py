"""What of a configuration is the algorithm, and may not differ unnoticed when a run goes on from a checkpoint.

Everything in the sections that shape training is, unless it is named here: a setting that is new counts until somebody
says that it does not. `run.steps` may change: a run may be made longer, and its learning rate then follows the longer
schedule.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from services.contracts.config import ConfigError, RunConfig

CONFIG = "config.json"  # in a checkpoint
SECTIONS = ("run", "model", "data", "dialogue", "sampling", "learner")
OPERATIONAL: Mapping[str, frozenset[str]] = {
    "run": frozenset({"name", "dir", "steps"}),
    "model": frozenset({"cache_dir"}),
    "learner": frozenset(
        {
            "checkpoint_async", "checkpoint_best", "checkpoint_every", "checkpoint_keep", "device",
            "dialogues_kept", "dialogues_mb", "gradient_checkpointing", "logits_mb",
            "max_nonfinite_steps", "metrics_host", "metrics_port", "micro_tokens", "offload_activations",
            "offload_optimizer", "processes", "rank_timeout_s", "reference_weights", "take_timeout_s",
            "threads", "wandb_project", "zero_stage",
        }
    ),
}  # fmt: skip
SECRETS: Mapping[str, frozenset[str]] = {
    "redis": frozenset({"url", "password"}),
    "rollout": frozenset({"control_token"}),
}
FLAG = "--accept-changes"


def kept(config: RunConfig) -> str:
    """The configuration as a checkpoint holds it (JSON): whole, but for secrets."""
    values = config.model_dump(mode="json")
    for section, names in SECRETS.items():
        values[section] = {name: value for name, value in values[section].items() if name not in names}
    return json.dumps(values, indent=1)


def changes(before: Mapping[str, Mapping[str, Any]], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the algorithm that differ: `section.name` -> (then, now), as JSON values.

    before: what `kept` made, maybe by another release. A setting that it did not have counts as the default; one that
    does not exist any more is passed over.
    """
    now = config.model_dump(mode="json")
    found = {}
    for section in SECTIONS:
        defaults = _defaults(getattr(config, section))
        ignored = OPERATIONAL.get(section, frozenset())
        if section == "learner" and config.learner.loss_mean == "paper":  # a mean over micro-batches depends on them
            ignored -= {"micro_tokens"}
        for name, value in now[section].items():
            then = before.get(section, {}).get(name, defaults.get(name))
            if name not in ignored and then != value:
                found[f"{section}.{name}"] = (then, value)
    return found


def changed_since(checkpoint: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`changes` against the configuration in a checkpoint; none where that is of a release that did not keep it."""
    try:
        before = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return changes(before, config)


def check_unchanged(checkpoint: Path, config: RunConfig) -> None:
    """Raise ConfigError, a line for each setting of the algorithm that is another than in `checkpoint`."""
    found = changed_since(checkpoint, config)
    if not found:
        return
    lines = [
        f"{name}: {_shown(now)}, but checkpoint {checkpoint.name} was trained with {_shown(then)}"
        for name, (then, now) in found.items()
    ]
    what = "it" if len(found) == 1 else "them"
    lines.append(
        f"--resume: the algorithm is not that of {checkpoint} ({', '.join(found)}): set {what} back, choose another "
        f"run.name, or go on with the change by {FLAG}"
    )
    raise ConfigError("\nmultiattempt: error: ".join(lines))


def _defaults(section: BaseModel) -> dict[str, Any]:
    kind = type(section)
    return kind.model_construct().model_dump(mode="json")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
