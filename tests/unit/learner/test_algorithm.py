import json
from pathlib import Path

import pytest

from services.contracts.config import ConfigError, RunConfig, load
from services.learner.algorithm import CONFIG, OPERATIONAL, changes, check_unchanged, kept


def config(*flags: str) -> RunConfig:
    return load(None, flags, env={})


def test_every_setting_that_is_named_operational_exists() -> None:
    for section, names in OPERATIONAL.items():
        assert names <= set(type(getattr(config(), section)).model_fields), section


def test_what_is_kept_has_no_secrets() -> None:
    text = kept(config("--redis.url=redis://:hush@h/0", "--rollout.control_token=hush", "--redis.password=hush"))
    assert "hush" not in text and json.loads(text)["learner"]["lr"] == 5e-7


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--learner.lr=1e-4"], ["learner.lr"]),
        (["--learner.betas=[0.9, 0.99]", "--dialogue.max_attempts=3"], ["dialogue.max_attempts", "learner.betas"]),
        (["--run.seed=1"], ["run.seed"]),
        (["--run.steps=7", "--learner.processes=2", "--learner.micro_tokens=64", "--rollout.replicas=3"], []),
        (["--learner.loss_mean=paper", "--learner.micro_tokens=64"], ["learner.micro_tokens", "learner.loss_mean"]),
    ],
)
def test_only_settings_of_the_algorithm_count(flags: list[str], changed: list[str]) -> None:
    assert sorted(changes(json.loads(kept(config())), config(*flags))) == sorted(changed)


def test_a_setting_that_the_checkpoint_does_not_know_was_its_default() -> None:
    before = json.loads(kept(config()))
    del before["learner"]["gamma"]
    before["learner"]["of_an_older_release"] = 1
    assert changes(before, config()) == {}
    assert changes(before, config("--learner.gamma=0.5")) == {"learner.gamma": (1.0, 0.5)}


def test_each_change_is_a_line_and_the_last_says_what_to_do(tmp_path: Path) -> None:
    checkpoint = tmp_path / "v00000008"
    checkpoint.mkdir()
    check_unchanged(checkpoint, config())  # of a release that kept no configuration
    (checkpoint / CONFIG).write_text(kept(config()))
    check_unchanged(checkpoint, config())
    with pytest.raises(ConfigError) as error:
        check_unchanged(checkpoint, config("--learner.lr=1e-4", "--data.digits=3"))
    first, second, last = str(error.value).splitlines()
    assert first == "data.digits: 3, but checkpoint v00000008 was trained with 2"
    assert second == "multiattempt: error: learner.lr: 0.0001, but checkpoint v00000008 was trained with 5e-07"
    assert "data.digits, learner.lr" in last and "--accept-changes" in last
