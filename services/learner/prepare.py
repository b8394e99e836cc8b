"""Make the run's starting model, once: `python -m services.learner.prepare --config runs/<name>/config.json`.

Writes `model.json` with the model's folder into the run's folder. Models that are made here (the demo's own, the
converted SmolLM2, either after a supervised warm-up) are cached under `model.cache_dir` by a hash of everything
they depend on; a half-made one is never left under its final name.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from services.contracts.config import ConfigError, RunConfig, load_resolved
from services.contracts.problems import Problem, load_problems

# Changing how models are made must change their hash: these files are part of it.
RECIPE_FILES = ("arithmetic_model.py", "smollm2.py", "warmup.py", "prepare.py")


def main() -> int:
    """Prepare the model of one run; 0 when it is ready, 2 for a configuration error (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m services.learner.prepare")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration (JSON) of the run")
    try:
        config = load_resolved(parser.parse_args().config)
        folder = prepare(config)
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)  # noqa: T201 - the one line a user sees
        return 2
    config.run_dir.mkdir(parents=True, exist_ok=True)
    note = config.run_dir / "model.json"
    partial = note.with_name(f".{note.name}.{os.getpid()}")  # a service may be reading the old one
    partial.write_text(json.dumps({"path": str(folder)}), encoding="utf-8")
    os.replace(partial, note)
    return 0


def prepare(config: RunConfig) -> Path:
    """Folder with the run's starting model and tokenizer. Raises ConfigError when there is none to be had."""
    if config.model.source == "pretrained" and not config.model.warmup_steps:
        return _pretrained(config)
    problems = list(load_problems(config).train) if config.model.warmup_steps else []
    final = config.model.cache_dir.expanduser() / f"{config.model.source}-{_content_hash(config, problems)}"
    if _is_made(final):
        _say(f"starting model: {final} (cached)")
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    try:
        _make(config, problems, partial)
        os.replace(partial, final)
    except OSError:
        if not _is_made(final):  # else another run made the same model meanwhile: it is as good as ours
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _is_made(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _pretrained(config: RunConfig) -> Path:
    path = config.model.path
    if not path:
        raise ConfigError("model.path: empty; name a local folder or a Hugging Face model, or set model.source")
    if (Path(path).expanduser() / "config.json").exists():
        return Path(path).expanduser().resolve()
    if Path(path).expanduser().is_absolute() or path.startswith("."):
        raise ConfigError(f"model.path: {path}: no config.json there; not a Hugging Face model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path}: neither a local folder nor to be had from the hub") from error


def _make(config: RunConfig, problems: list[Problem], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from services.learner.arithmetic_model import build_model, build_tokenizer
    from services.learner.smollm2 import load_smollm2
    from services.learner.warmup import warm_up

    model: Any
    tokenizer: Any
    torch.manual_seed(config.run.seed)
    started = time.monotonic()
    if config.model.source == "arithmetic":
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, context=config.model.max_model_len)
    elif config.model.source == "smollm2":
        _say("starting model: converting SmolLM2-135M-Instruct from GGUF")
        model, tokenizer = load_smollm2()
    else:
        path = _pretrained(config)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if config.model.warmup_steps:
        steps = config.model.warmup_steps
        _say(f"starting model: supervised warm-up, {steps} steps (once; cached)")
        warm_up(
            model,
            tokenizer,
            problems,
            config,
            report=lambda step, loss: _say(f"starting model: warm-up {step}/{steps}, loss {loss:.3f}"),
        )
    model.to(getattr(torch, config.model.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _say(f"starting model: made in {time.monotonic() - started:.0f} s")


def _content_hash(config: RunConfig, problems: list[Problem]) -> str:
    """Of everything the made model depends on: its settings, its training problems and the code that makes it."""
    digest = hashlib.sha256()
    settings = {
        "model": config.model.model_dump(mode="json", exclude={"cache_dir"}),
        "dialogue": config.dialogue.model_dump(mode="json"),
        "seed": config.run.seed,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for problem in problems:
        digest.update(repr(problem).encode())
    for name in RECIPE_FILES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the launcher shows these lines as progress


if __name__ == "__main__":
    sys.exit(main())
