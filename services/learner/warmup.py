"""Supervised warm-up on dialogues in the run's own format, so that PPO starts from a model that answers.

A dialogue shows some wrong attempts (never trained on), the feedback each earned, and a last attempt that is trained:
right, or wrong in one digit in a share `model.warmup_errors` of the later dialogues. Where a run keeps verdicts from
the model (`dialogue.feedback`), half of the attempts before the last are right. It teaches the format and a first
accuracy; doing better, and using the feedback, is left to reinforcement.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.contracts.config import RunConfig
from services.contracts.problems import Problem
from services.contracts.template import feedback_turn, neutral_turn, prompt_ids, reply_ids
from services.contracts.wire import Verdict

Example = tuple[list[int], list[int]]  # (ids, labels)
IGNORED = -100  # label of tokens without loss, as in torch.nn.functional.cross_entropy
RETRY_SHARE = 0.15  # chance that a warm-up dialogue shows one more wrong attempt
ERRORS_IN_LAST = 0.25  # share of the steps that show errors: right answers first, or it learns too slowly
REPORT_EVERY_S = 5.0

log = logging.getLogger(__name__)


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    config: RunConfig,
    *,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train `model` in place for `model.warmup_steps` AdamW steps; returns the last loss (nats per answer token).

    The learning rate rises over the first sixth and falls linearly to zero.
    """
    rng = random.Random(config.run.seed)
    steps = config.model.warmup_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.model.warmup_lr, betas=(0.9, 0.98), weight_decay=0.01)
    step_loss, reported = float("nan"), time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.model.warmup_lr * _schedule(step, steps)
        errors = config.model.warmup_errors if step >= steps * (1 - ERRORS_IN_LAST) else 0.0
        batch = (rng.choice(problems) for _ in range(config.model.warmup_batch))
        examples = [_example(tokenizer, problem, config, rng, errors=errors) for problem in batch]
        num_answer_tokens = sum(label != IGNORED for _, labels in examples for label in labels[1:])
        step_loss = 0.0
        for chunk in _by_length(examples):
            input_ids, labels = _pad(chunk, pad_id=tokenizer.pad_token_id or 0)
            logits = model(input_ids=input_ids).logits  # right padding: causal attention never looks at it
            loss = (
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
                )
                / num_answer_tokens
            )
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if time.monotonic() - reported > REPORT_EVERY_S or step == steps - 1:
            reported = time.monotonic()
            report(step + 1, step_loss)
    model.eval()
    return step_loss


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 6)
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def _example(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, config: RunConfig, rng: random.Random, *, errors: float
) -> Example:
    """(ids, labels) of one dialogue; labels are IGNORED outside the correct attempt."""
    dialogue = config.dialogue
    max_attempts = rng.randint(dialogue.min_attempts, dialogue.max_attempts)
    num_earlier = 0
    while num_earlier < max_attempts - 1 and rng.random() < RETRY_SHARE:
        num_earlier += 1
    ids = prompt_ids(tokenizer, dialogue, problem.question, max_attempts=max_attempts)
    working = f"{problem.rationale} " if problem.rationale else ""
    is_told = dialogue.feedback == "truth"
    for attempt in range(num_earlier):
        is_wrong = is_told or rng.random() < 0.5
        earlier = _near_miss(problem.gold[0], rng) if is_wrong else problem.gold[0]
        ids += tokenizer.encode(f"{working}\\boxed{{{earlier}}}", add_special_tokens=False)
        left = max_attempts - attempt - 1
        turn = (
            feedback_turn(dialogue, Verdict.INCORRECT, attempts_left=left)
            if is_told
            else neutral_turn(dialogue, attempts_left=left)
        )
        ids += reply_ids(tokenizer, dialogue, turn, turn_closed=False)
    last = _near_miss(problem.gold[0], rng) if rng.random() < errors else problem.gold[0]
    answer = tokenizer.encode(f"{working}\\boxed{{{last}}}", add_special_tokens=False)
    return ids + answer, [IGNORED] * len(ids) + answer


def _by_length(examples: Sequence[Example], *, num_chunks: int = 4) -> Iterator[Sequence[Example]]:
    """Chunks of examples of similar length: dialogues with more attempts are longer, and padding is wasted work."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    size = -(-len(ordered) // num_chunks)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _near_miss(gold: str, rng: random.Random) -> str:
    """A wrong answer that looks like the right one: one digit changed."""
    places = [i for i, c in enumerate(gold) if c.isdigit()]
    if not places:
        return f"{gold}?"
    place = rng.choice(places)
    return gold[:place] + rng.choice([d for d in "123456789" if d != gold[place]]) + gold[place + 1 :]


def _pad(examples: Sequence[Example], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), both int64 [B, T], right-padded; padding has no loss."""
    width = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (ids, targets) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    return input_ids, labels
