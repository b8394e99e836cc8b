"""`multiattempt eval MODEL` on real parts: it starts Valkey, grader and vLLM, measures, and leaves nothing running."""

import json
import os
from pathlib import Path

import psutil
import pytest
from boxy_model import save_model

from services.cli.__main__ import main
from services.evaluation.journal import read_dialogues

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
FLAGS = {
    "model.dtype": "float32", "model.max_model_len": "256", "dialogue.system_prompt": "You have {attempts}",
    "dialogue.tokens_per_attempt": "24", "rollout.device": "cpu", "rollout.max_num_seqs": "16",
    "rollout.kv_cache_mb": "64",
}  # fmt: skip


def test_a_model_folder_is_evaluated_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "boxy")
    problems = tmp_path / "mine.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{i}+1", "answer": "7"}) + "\n" for i in range(6)))
    output = tmp_path / "out"
    words = ["eval", str(tmp_path / "boxy"), "--benchmarks", f"mine={problems}", "--attempts", "1-2", "--seeds", "2",
             "--output", str(output), *(f"--{name}={value}" for name, value in FLAGS.items())]  # fmt: skip
    assert main([*words, "--rollout.kv_cache_mb=99000000"]) == 2
    assert "memory: " in capsys.readouterr().err and not (output / "dialogues.jsonl").exists()

    assert main(words) == 0
    dialogues = read_dialogues(output)
    assert len(dialogues) == 6 * (4 + 2) and not any(dialogue.refused for dialogue in dialogues)
    curve = json.loads((output / "results.json").read_text())["curves"]["mine"]
    solved = [dialogue.is_solved for dialogue in dialogues if dialogue.max_attempts == 2]
    assert curve["points"][1]["accuracy"]["value"] == pytest.approx(sum(solved) / len(solved))
    assert len(json.loads((output / "evaluation.json").read_text())["weights"]["sha256"]) == 16
    ours = psutil.Process(os.getpid()).children(recursive=True)
    assert not [child for child in ours if "services" in " ".join(child.cmdline())]

    capsys.readouterr()
    assert main(words) == 0  # all is there: no engine is started again
    assert "starting grader" not in capsys.readouterr().out
