"""The actor as a Hugging Face folder for transformers and vLLM: weights, configurations, tokenizer, model card."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from services.contracts.config import RunConfig
from services.learner.models import Actor

_SHOWN = {
    "reward": "mean reward",
    "accuracy_first": "solved at the first attempt",
    "accuracy_last": "solved at the last attempt",
    "attempts_mean": "attempts made",
    "response_tokens": "sampled tokens of a dialogue",
    "truncated": "dialogues that ran out of tokens",
    "kl_ref": "KL to the starting model, nats per token",
}


class HfExporter:
    """Writes exports of one run. model_path: where the tokenizer is from."""

    def __init__(self, config: RunConfig, actor: Actor, model_path: Path) -> None:
        self._config, self._model, self._model_path = config, actor.model, model_path
        self._tokenizer: Any = None

    def write(self, folder: Path, weights: Mapping[str, Tensor], *, version: int, figures: Mapping[str, float]) -> None:
        """weights: by Hugging Face names, a tied head absent. figures: of the updates that the card shall tell of."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self._model.config.save_pretrained(folder)
        if self._model.can_generate():
            self._generation_config().save_pretrained(folder)
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._model_path)
        self._tokenizer.save_pretrained(folder)
        card = model_card(self._config, version=version, figures=figures, parameters=_count(weights))
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _generation_config(self) -> Any:
        """The model's own, sampling as in training."""
        generation = copy.deepcopy(self._model.generation_config)
        sampling = self._config.sampling
        generation.do_sample = True
        generation.temperature, generation.top_p = sampling.temperature, sampling.top_p
        generation.top_k = max(0, sampling.top_k)  # 0: all, for transformers as for vLLM
        return generation


def model_card(config: RunConfig, *, version: int, figures: Mapping[str, float], parameters: int) -> str:
    """README.md of an export: what it was trained from, on what, how, and how it did in training."""
    learner, dialogue, model = config.learner, config.dialogue, config.model
    base = model.path if model.source == "pretrained" else model.source
    is_hub_name = model.source == "pretrained" and base.count("/") == 1 and not Path(base).expanduser().exists()
    data = config.data.train if config.data.source != "arithmetic" else f"sums of {config.data.digits}-digit numbers"
    facts = {
        "run": f"{config.run.name}, seed {config.run.seed}",
        "starting model": base,
        "parameters": f"{parameters:,}, {model.dtype}",
        "policy updates": f"{version} of {config.run.steps}, {learner.batch_dialogues} dialogues each",
        "problems": data,
        "attempts allowed": f"{dialogue.min_attempts} to {dialogue.max_attempts}, drawn for each dialogue",
        "prompt and feedback": f"template {dialogue.template!r}, environment {dialogue.environment!r}",
        "algorithm": f"clipped policy gradient (PPO), advantages {learner.advantage!r}, gamma {learner.gamma:g}"
        + (f", lambda {learner.lam:g}" if learner.advantage == "gae" else ""),
        "learning rate": f"{learner.lr:g} at its peak",
        "KL to the starting model": f"{learner.kl_coef:g}, in the {learner.kl_in}" if learner.kl_coef else "none",
        "staleness": f"at most {learner.max_staleness} versions",
        "sampling": f"temperature {config.sampling.temperature:g}",
    }
    measured = {said: figures[name] for name, said in _SHOWN.items() if name in figures}
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if is_hub_name else []
    lines += [
        "tags: [reinforcement-learning, ppo, multi-attempt]",
        "---",
        "",
        f"# {config.run.name}, version {version}",
    ]
    lines += ["", "A language model trained by multi-attempt reinforcement learning: it answers, is told when it is"]
    lines += ["wrong, and may try again.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    if measured:
        lines += ["", "In training, mean of the updates since the checkpoint before, not of held-out problems:", ""]
        lines += ["| | |", "|---|---:|", *(f"| {said} | {value:.4g} |" for said, value in measured.items())]
    if dialogue.template == "chat" and dialogue.system_prompt:
        lines += ["", "System prompt, where `{attempts}` is `1 attempt`, `2 attempts` and so on:", ""]
        lines += ["```", dialogue.system_prompt, "```"]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("this/folder")', "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())
