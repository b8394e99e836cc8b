"""Checkpoints for another number of ranks, or another ZeRO stage, than wrote them: DeepSpeed's universal format.

Under ZeRO 1 to 3 each rank's file holds its own slice of the optimiser's state, so the slices are put together,
parameter by parameter, into a folder that any number of ranks loads from. The conversion is DeepSpeed's own tool, run
as the process that it is meant to be.
"""

import subprocess
import sys
from pathlib import Path

from services.learner.deepspeed_engine import TAG

TIMEOUT_S = 3600.0
WORKERS = 2  # each holds a rank's slice in memory


def convert(checkpoint: Path, names: list[str], target: Path) -> None:
    """Write engines `names` of `checkpoint` below `target`. Raises RuntimeError with the tool's last words."""
    for name in names:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--num_extract_workers", str(WORKERS), "--num_merge_workers", str(WORKERS)]
        command += ["--input_folder", str(checkpoint / name / TAG), "--output_folder", str(target / name / TAG)]
        (target / name).mkdir(parents=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"{checkpoint / name} could not be converted: {''.join(said)}")
