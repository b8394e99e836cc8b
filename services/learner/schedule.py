"""Learning-rate schedule (paper.md section 2): linear warm-up, then cosine decay to a share of the peak."""

import math


def lr_at(step: int, *, total: int, peak: float, warmup: float, min_ratio: float) -> float:
    """Learning rate of optimiser step number `step` (from 0) out of `total`.

    warmup: share of all steps that rise linearly; ceil(warmup * total) steps, the first of which is already above 0
    (the reference wastes it). min_ratio: the last steps approach this share of `peak`.
    """
    warmup_steps = math.ceil(warmup * total)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
