"""`multiattempt prepare`: what `train` does before it starts services, for those that others start (containers).

The services read the experiment's TOML file and their own environment; what they find in the run's folder is
`model.json`, the starting model. `config.json` is for a person's commands there: status, audit, chat, plot. Safe to
repeat beside a run that is under way.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from services.cli.launcher import write_resolved
from services.cli.preflight import check_inputs
from services.cli.services import Plan
from services.contracts.config import ConfigError, load


def run_prepare(path: Path, overrides: Sequence[str]) -> int:
    """Check what the run needs, write its configuration, make its starting model. Returns the exit code.

    Raises ConfigError.
    """
    config = load(path, overrides)
    if not config.redis.url:
        raise ConfigError("redis.url: empty; services that are started one by one need a server: redis://host:6379/0")
    check_inputs(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    model = Plan(config, write_resolved(config)).one_shot("prepare")
    return subprocess.run(model.command, env=dict(model.environment), check=False).returncode
