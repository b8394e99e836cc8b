"""One learner rank for test_deepspeed_engine: `python learner_rank.py RUN_FOLDER OUTPUT UPDATES MODE`.

MODE: `fresh` trains UPDATES updates and saves; `resume` continues from the checkpoint. Rank 0 writes the actor's and
critic's weights (through the publishing source) and metrics to OUTPUT.
"""

import json
import sys
from pathlib import Path

import torch
from learner_data import make_trajectory

from services.contracts.books import Books
from services.contracts.config import load_resolved
from services.learner.trainer import Trainer


def main() -> None:
    folder, output, updates, mode = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    config = load_resolved(folder / "config.json")
    trainer = Trainer.start(config, resume=mode == "resume")
    if not trainer.ranks.leads:
        trainer.follow()
        trainer.close()
        return
    figures = []
    for _ in range(updates):
        size = config.learner.batch_dialogues
        batch = [make_trajectory(trainer.version * size + i, attempts=1 + i % 3) for i in range(size)]
        figures.append(trainer.train(batch))
    output.mkdir()
    torch.save(dict(trainer.source), output / "actor.pt")
    names = [meta.name for meta in trainer.source.metadata()]
    assert names == list(dict(trainer.source))
    trainer.save(next_task=7, books=Books(), figures={"reward": 0.5}).result()
    (output / "metrics.json").write_text(json.dumps({"figures": figures, "start": trainer.next_task}))
    trainer.close()


if __name__ == "__main__":
    main()
