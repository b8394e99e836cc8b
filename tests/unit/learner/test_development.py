"""The evaluation between two updates: whatever becomes of its process, training goes on."""

import sys
from pathlib import Path

import pytest

from services.learner.development import Development

PRINTS = "import json, sys; print(json.dumps({'dev_accuracy': 0.5, 'version': int(sys.argv[-1])}))"


@pytest.mark.parametrize(
    ("program", "figures"),
    [
        (PRINTS, {"dev_accuracy": 0.5, "version": 8.0}),
        ("import sys; print('no replica', file=sys.stderr); sys.exit(1)", {}),
        ("import time; time.sleep(60)", {}),
    ],
)
async def test_its_figures_are_what_the_process_prints(program: str, figures: dict[str, float]) -> None:
    evaluate = Development(Path("config.json"), timeout_s=3.0, program=(sys.executable, "-c", program))
    assert await evaluate(8) == figures
