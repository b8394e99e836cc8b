"""Finding runs: the folders that the launcher writes, for whoever looks at one from outside."""

from pathlib import Path

from services.contracts.config import ConfigError


def resolved_config(run: Path) -> Path:
    """The run's config.json. Raises ConfigError when this is no run."""
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run}: not a run, it has no config.json; runs are folders under runs/")
    return path


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run that was started last. Raises ConfigError when there is none."""
    started = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not started:
        raise ConfigError(f"no run under {runs.absolute()}; name its folder, or start one: multiattempt train CONFIG")
    return started[-1].parent
