"""The paper's own curves (Chung, Du, Fu 2025, arXiv 2503.04808, Figures 1 and 5), in %, at 1 to 7 allowed attempts.

Digitised; greedy, one run, Qwen2.5-Math-1.5B, their grader. `multi` is trained with 1 to 5 attempts, `base` with one.
"""

from collections.abc import Mapping

from services.evaluation.benchmarks import PAPER

ATTEMPTS = (1, 2, 3, 4, 5, 6, 7)
LABELS: Mapping[str, str] = {"multi": "paper, multi-attempt", "base": "paper, baseline"}

CURVES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "aime24": {
        "multi": (26.7, 26.7, 26.7, 26.7, 20.0, 23.3, 20.0),
        "base": (13.3, 13.3, 16.7, 13.3, 16.7, 20.0, 13.3),
    },
    "math500": {
        "multi": (73.4, 80.0, 81.0, 82.2, 83.0, 82.0, 83.4),
        "base": (76.2, 76.4, 76.2, 76.4, 76.4, 75.8, 75.8),
    },
    "amc23": {
        "multi": (60.0, 72.5, 65.0, 72.5, 67.5, 67.5, 72.5),
        "base": (55.0, 52.5, 55.0, 57.5, 55.0, 57.5, 55.0),
    },
    "minerva_math": {
        "multi": (34.2, 43.0, 41.9, 41.9, 43.4, 44.5, 42.6),
        "base": (31.6, 35.3, 34.6, 33.8, 33.5, 32.0, 33.8),
    },
    "olympiadbench": {
        "multi": (33.6, 40.3, 44.1, 45.8, 44.0, 42.5, 43.4),
        "base": (35.7, 38.4, 38.8, 39.0, 37.2, 37.5, 36.4),
    },
}


def average(model: str) -> tuple[float, ...]:
    """The unweighted mean of the five benchmarks."""
    return tuple(sum(CURVES[name][model][i] for name in PAPER) / len(PAPER) for i in range(len(ATTEMPTS)))
