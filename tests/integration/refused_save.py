"""A learner rank whose second checkpoint fails: `python refused_save.py RUN_FOLDER OUTPUT WHAT`.

WHAT: `full disk`, of rank 1 while it writes, and once only; `kill`: both are killed while they write; `hang`: there is
no checkpoint, the ranks wait for rank 0, which is going to be stopped.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from learner_data import make_trajectory

from services.contracts.books import Books
from services.contracts.config import load_resolved
from services.learner import saver
from services.learner.checkpoint import CheckpointError
from services.learner.host_copy import HostCopies
from services.learner.trainer import Trainer


class FullDisk(HostCopies):
    """Its second file does not fit."""

    def write(self) -> None:
        path, content = self._files.popleft()
        torch.save(content, path)
        raise OSError(errno.ENOSPC, "No space left on device")


class Killed(HostCopies):
    """The process dies after its first file."""

    def write(self) -> None:
        path, content = self._files.popleft()
        torch.save(content, path)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, output, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = load_resolved(folder / "config.json")
    trainer = Trainer.start(config, resume=False)
    if what == "hang":
        if trainer.ranks.leads:
            output.touch()
            time.sleep(90)
        trainer.follow()
    kind = Killed if what == "kill" else FullDisk if trainer.ranks.rank == 1 else HostCopies
    in_turn = iter([HostCopies, kind, HostCopies])
    saver.HostCopies = lambda *, copies: next(in_turn)(copies=copies)  # type: ignore[assignment,misc]
    if not trainer.ranks.leads:
        trainer.follow()
        trainer.close()
        return
    size = config.learner.batch_dialogues
    batch = [make_trajectory(i, attempts=1 + i % 3) for i in range(size)]
    trainer.train(batch)
    trainer.save(1, Books(), {"reward": 1.0}).result()
    trainer.train(batch)
    said = "it was written"
    try:
        trainer.save(2, Books(), {}).result()
    except CheckpointError as error:
        said = str(error)
    left = listing(folder)
    trainer.save(2, Books(), {}).result()
    output.write_text(json.dumps({"error": said, "left": left, "then": listing(folder)}))
    trainer.close()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


if __name__ == "__main__":
    main()
