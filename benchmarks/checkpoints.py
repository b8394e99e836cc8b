"""How long training stands still for a checkpoint, how long it takes to the disk, and how large it is.

`make bench-checkpoints`. Actor and critic of the demo's model (fp32, ZeRO 0) and of SmolLM2-135M's shape (bf16, ZeRO 2)
are trained for one step and saved NUM_ROUNDS times as the learner does, nothing else going on. Cases:

- `blocked`: seconds that training waits, against saving with `checkpoint_async = false`.
- `disk`: bytes/s from the copy to the durable checkpoint, against writing and flushing as many bytes to one file.

It also prints the size of each part and the seconds of a resume. The last lines are one JSON object per claim.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.contracts.books import Books
from services.contracts.config import RunConfig, load
from services.learner.arithmetic_model import build_model, build_tokenizer
from services.learner.trainer import Trainer
from tests.learner_data import make_trajectory

NUM_ROUNDS = 5
BLOCK = 16 << 20
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
FLAGS = {
    "demo": ("--model.dtype=float32", "--learner.zero_stage=0"),
    "smollm2": ("--model.dtype=bfloat16", "--learner.zero_stage=2"),
}


def main() -> None:
    """Measure one model and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FLAGS, default="demo")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the system's temporary one")
    name, place = parser.parse_args().model, parser.parse_args().folder
    with tempfile.TemporaryDirectory(prefix="bench-checkpoints-", dir=place) as temporary:
        config = configured(name, Path(temporary))
        trainer = Trainer.start(config, resume=False)
        train(trainer, config)
        save(trainer, is_async=True)  # the first opens the tokenizer
        rounds = [(save(trainer, is_async=True), save(trainer, is_async=False)) for _ in range(NUM_ROUNDS)]
        blocked, durable = zip(*(one for one, _ in rounds), strict=True)
        waiting = [other[1] for _, other in rounds]
        newest = config.run_dir / "checkpoints" / f"v{trainer.version:08d}"
        sizes = {part.name: size(part) for part in sorted(newest.iterdir())}
        total = sum(sizes.values())
        plain = [write_plainly(Path(temporary) / "plain", total) for _ in range(NUM_ROUNDS)]
        started = time.perf_counter()
        trainer._resume()
        resume_s = time.perf_counter() - started
        trainer.close()
    parts = ", ".join(f"{part} {num_bytes / 1e6:.1f}" for part, num_bytes in sizes.items() if num_bytes > 1e5)
    print(f"{name}: {total / 1e6:.1f} MB ({parts}); loaded again in {resume_s:.2f} s")
    print(f"{name}: training waits {', '.join(f'{s:.2f}' for s in blocked)} s, durable after", end=" ")
    print(f"{', '.join(f'{s:.2f}' for s in durable)} s; without a copy {', '.join(f'{s:.2f}' for s in waiting)} s")
    a, b = statistics.median(blocked), statistics.median(waiting)
    claim(f"{name}, blocked", a, b, "s")
    writing = statistics.median(d - b for d, b in zip(durable, blocked, strict=True))
    claim(f"{name}, disk", total / writing / 1e6, total / statistics.median(plain) / 1e6, "MB/s")


def configured(name: str, folder: Path) -> RunConfig:
    """A run whose model is random."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMOLLM2) if name == "smollm2" else build_model(tokenizer, context=256)
    model.to(torch.bfloat16 if name == "smollm2" else torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    base = (f"--run.dir={folder}", "--run.name=checkpoints", "--learner.device=cpu", "--learner.checkpoint_keep=1")
    small = ("--learner.batch_dialogues=4", "--learner.minibatch_dialogues=4", "--learner.kl_coef=0")
    unchecked = "--learner.mismatch_limit=0"  # the dialogues are random
    config = load(None, [*base, *small, unchecked, *FLAGS[name]], env={})
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(folder / "model")}))
    return config


def train(trainer: Trainer, config: RunConfig) -> None:
    """One update, so that the optimisers have moments."""
    trainer.train([make_trajectory(i) for i in range(config.learner.batch_dialogues)])


def save(trainer: Trainer, *, is_async: bool) -> tuple[float, float]:
    """Seconds until training could go on, and until the checkpoint was durable."""
    trainer._saver._is_async = is_async
    started = time.perf_counter()
    writing = trainer.save(0, Books(), {"reward": 0.0})
    blocked = time.perf_counter() - started
    writing.result()
    return blocked, time.perf_counter() - started


def write_plainly(path: Path, num_bytes: int) -> float:
    """Seconds to write and flush so many bytes to one file."""
    block = os.urandom(BLOCK)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // BLOCK):
            file.write(block)
        file.write(block[: num_bytes % BLOCK])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def claim(case: str, ours: float, reference: float, unit: str) -> None:
    """One line of JSON."""
    figures = {"ours": round(ours, 3), "reference": round(reference, 3), "ratio": round(ours / reference, 3)}
    print(json.dumps({"benchmark": "checkpoints", "case": case, **figures, "unit": unit}))


if __name__ == "__main__":
    main()
