"""A replica as far as its GPUs go: `gpu_holder.py REDIS_URL REPLICA_ID LEASE_S WAIT_S COUNT GPU...` until killed.

Prints the GPUs that it leased, and "released" when SIGTERM ended it.
"""

import os
import sys
import time

from services.contracts.config import ConfigError, load
from services.rollout.ending import Signals
from services.rollout.gpu_lease import leased_gpus


def main() -> int:
    url, replica_id, lease_s, wait_s, count, *gpus = sys.argv[1:]
    flags = [f"--redis.url={url}", f"--rollout.gpu_wait_s={wait_s}", f"--rollout.tensor_parallel_size={count}"]
    environ: dict[str, str] = {}
    Signals()
    try:
        with leased_gpus(
            load(None, flags, env={}), replica_id, environ=environ, list_gpus=lambda: gpus, lease_s=float(lease_s)
        ):
            sys.stdout.write(environ["CUDA_VISIBLE_DEVICES"] + "\n")
            sys.stdout.flush()
            time.sleep(120)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as end:
        if end.code == 143:
            os.write(1, b"released\n")
        raise
