"""The reference for `benchmarks.e2e`: TRL's GRPOTrainer with its own generation, in a virtual environment of its own.

`python trl_grpo.py SETTINGS.json` prints a line of JSON for each batch of trajectories: seconds, of them for
generation, and mean length of the completions in tokens. It imports nothing of this repository. Everything that costs
TRL time and that its rival does not do is switched off: reference model, logging, checkpoints, gradient checkpointing,
autocast. The reward is an exact match in this process.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

BOX = re.compile(r"\\boxed\{([^}]*)")  # the brace that closes it may be the end-of-turn token, which TRL cuts off


class Rewards:
    """1 for the right box, -0.5 for a wrong one, -1 for none; notes how long the completions are."""

    __name__ = "boxed"

    def __init__(self) -> None:
        self.num_tokens: list[int] = []

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], gold: list[str], **_: Any
    ) -> list[float]:
        self.num_tokens += [len(ids) for ids in completion_ids]
        found = [BOX.search(text) for text in completions]
        return [
            -1.0 if box is None else (1.0 if box[1] == answer else -0.5)
            for box, answer in zip(found, gold, strict=True)
        ]


class Clock(TrainerCallback):
    """Prints a line for each batch that is trained."""

    def __init__(self, steps_per_batch: int, rewards: Rewards) -> None:
        self._steps, self._rewards = steps_per_batch, rewards
        self._at = time.perf_counter()
        self.generate_s = 0.0

    def on_step_end(self, args: object, state: Any, control: object, **_: Any) -> None:
        if state.global_step % self._steps:
            return
        now, lengths = time.perf_counter(), self._rewards.num_tokens
        line = {"seconds": now - self._at, "generate_s": self.generate_s, "tokens": sum(lengths) / len(lengths)}
        print(json.dumps(line), flush=True)
        self._at, self.generate_s = now, 0.0
        lengths.clear()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.eos_token = settings["end"]  # where an attempt ends, as the rollout service ends it
    steps_per_batch = settings["batch"] // settings["minibatch"]
    config = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["minibatch"],
        gradient_accumulation_steps=1,
        steps_per_generation=steps_per_batch,
        num_iterations=1,
        num_generations=settings["group"],
        max_completion_length=settings["max_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        max_steps=settings["batches"] * steps_per_batch,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )
    rewards = Rewards()
    clock = Clock(steps_per_batch, rewards)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])),
        reward_funcs=[rewards],
        args=config,
        train_dataset=Dataset.from_list(settings["problems"]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    generate = trainer._generate

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        answer = generate(*arguments, **named)
        clock.generate_s += time.perf_counter() - started
        return answer

    trainer._generate = timed
    trainer.train()


if __name__ == "__main__":
    main()
