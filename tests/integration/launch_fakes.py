"""Runs the launcher on fake services, in a process that a test can signal: `launch_fakes.py [--section.key value]`."""

import asyncio
import sys
from pathlib import Path

from services.cli.launcher import launch
from services.contracts.config import ConfigError, load

FAKE = str(Path(__file__).with_name("fake_service.py"))
PROGRAMS = {
    kind: (sys.executable, "-u", FAKE, kind) for kind in ("prepare", "grader", "rollout", "learner", "evaluation")
}

if __name__ == "__main__":
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
    try:
        sys.exit(
            asyncio.run(launch(load(None, flags), resume="--resume" in sys.argv, command="again", programs=PROGRAMS))
        )
    except ConfigError as error:
        sys.stderr.write(f"multiattempt: error: {error}\n")
        sys.exit(2)
