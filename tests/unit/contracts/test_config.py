"""RunConfig: where values come from, and what a mistake is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.config import ConfigError, RunConfig, load, load_resolved, model_path, to_toml_dict

ROOT = Path(__file__).parents[3]
SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()}


def read(folder: Path, toml: str, *flags: str, env: dict[str, str] | None = None) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(toml, encoding="utf-8")
    return load(path, flags, env or {})


def mistake(folder: Path, toml: str, *flags: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, toml, *flags, env=env)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


# Where values come from


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    toml = "[run]\nseed = 1\nsteps = 1\nname = 'file'"
    env = {"MULTIATTEMPT_RUN__SEED": "2", "MULTIATTEMPT_RUN__STEPS": "2", "PATH": "/bin"}
    run = read(tmp_path, toml, "--run.seed", "3", env=env).run
    assert (run.seed, run.steps, run.name, run.dir) == (3, 2, "file", Path("runs"))


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIATTEMPT_RUN__SEED", "9")
    assert load(None).run.seed == 9


def test_a_secret_can_come_from_a_file_that_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n", encoding="utf-8")
    env = {"MULTIATTEMPT_ROLLOUT__CONTROL_TOKEN_FILE": str(tmp_path / "token")}
    assert read(tmp_path, "", env=env).rollout.control_token == "s3cret"
    told = mistake(tmp_path, "", env={"MULTIATTEMPT_ROLLOUT__CONTROL_TOKEN_FILE": str(tmp_path / "gone")})
    assert told == "environment variable MULTIATTEMPT_ROLLOUT__CONTROL_TOKEN_FILE: gone: No such file or directory"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://redis:6379/0", "redis://:p%40s%2Fs@redis:6379/0"),
        ("rediss://user@redis:6379/0?ssl_ca_certs=/ca", "rediss://user:p%40s%2Fs@redis:6379/0?ssl_ca_certs=/ca"),
        ("redis://:own@redis:6379/0", "redis://:own@redis:6379/0"),
        ("unix:///run/redis.sock", "unix://:p%40s%2Fs@/run/redis.sock"),
        ("", ""),
    ],
)
def test_a_password_of_its_own_goes_into_the_url_that_has_none(tmp_path: Path, url: str, expected: str) -> None:
    (tmp_path / "password").write_text("p@s/s", encoding="utf-8")
    env = {"MULTIATTEMPT_REDIS__URL": url, "MULTIATTEMPT_REDIS__PASSWORD_FILE": str(tmp_path / "password")}
    assert read(tmp_path, "", env=env).redis.url == expected


def test_a_service_takes_a_toml_file_with_the_environment_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\nseed = 1\nsteps = 1", encoding="utf-8")
    monkeypatch.setenv("MULTIATTEMPT_RUN__SEED", "2")
    assert (load_resolved(path).run.seed, load_resolved(path).run.steps) == (2, 1)


def test_the_last_of_two_flags_counts(tmp_path: Path) -> None:
    assert read(tmp_path, "", "--run.seed", "3", "--run.seed=4").run.seed == 4


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("learner.lr=1e-4", 1e-4),
        ("learner.offload_optimizer=true", True),
        ("learner.offload-optimizer=true", True),
        ("evaluation.attempts=[1, 3]", (1, 3)),
        ("learner.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("run.name=007", "007"),
        ("run.dir=5", Path("5")),
        ("model.dtype=float32", "float32"),
        ("sampling.top_k=-1", -1),
        ("dialogue.system_prompt=a = [1], {attempts}", "a = [1], {attempts}"),
        ("dialogue.system_prompt=--", "--"),
        ("redis.url=redis://:p=w@h:1/0", "redis://:p=w@h:1/0"),
        ("dialogue.examples=[['1+1', '\\\\boxed{2}']]", (("1+1", "\\\\boxed{2}"),)),
    ],
)
def test_text_becomes_what_the_key_wants(tmp_path: Path, flag: str, expected: object) -> None:
    section, _, key = flag.partition("=")[0].replace("-", "_").partition(".")
    assert getattr(getattr(read(tmp_path, "", f"--{flag}"), section), key) == expected


@given(text=st.text(max_size=40))
def test_any_text_survives_a_flag(text: str) -> None:
    if "{" not in text and "}" not in text:
        assert load(None, [f"--dialogue.system_prompt={text}"], {}).dialogue.system_prompt == text


@given(value=st.floats(min_value=1e-12, max_value=1e6))
def test_any_number_survives_a_flag(value: float) -> None:
    assert load(None, ["--learner.lr", repr(value)], {}).learner.lr == value


def test_the_resolved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = read(tmp_path, "", "--learner.lr=1e-4", "--run.dir=/tmp/x", "--dialogue.examples=[['1+1', '2']]")
    resolved = tmp_path / "config.json"
    resolved.write_text(json.dumps(to_toml_dict(config)), encoding="utf-8")
    assert load_resolved(resolved) == config


def test_the_resolved_configuration_ignores_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = tmp_path / "config.json"
    resolved.write_text(json.dumps(to_toml_dict(load(None, [], {}))), encoding="utf-8")
    monkeypatch.setenv("MULTIATTEMPT_RUN__SEED", "9")
    assert load_resolved(resolved).run.seed == 42


def test_the_model_path_is_what_preparation_noted(tmp_path: Path) -> None:
    config = load(None, [f"--run.dir={tmp_path}"], {})
    with pytest.raises(ConfigError, match="not prepared"):
        model_path(config)
    config.run_dir.mkdir()
    (config.run_dir / "model.json").write_text('{"path": "/models/x"}', encoding="utf-8")
    assert model_path(config) == Path("/models/x")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load(path, [], {}).run.steps >= 1


# What a mistake is told


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[learner]\nlrr = 1", "run.toml: unknown key learner.lrr, did you mean learner.lr?"),
        ("[run]\nlr = 1", "run.toml: unknown key run.lr, did you mean learner.lr?"),
        ("[run]\nqqqqq = 1", "run.toml: unknown key run.qqqqq; known: name, dir, seed, steps"),
        ("[lerner]\nlr = 1", "run.toml: unknown section [lerner], did you mean learner?"),
        ("steps = 5", "run.toml: unknown section [steps], did you mean run.steps?"),
        ("run = 5", "run.toml: run is a section, write its keys under [run]"),
        ("[run]\nsteps = 'many'", "run.toml: run.steps: Input should be a valid integer"),
        ("[run]\nsteps = 1.5", "run.toml: run.steps: Input should be a valid integer"),
        ("[run]\nsteps = 0", "run.toml: run.steps: Input should be greater than or equal to 1, got 0"),
        ("[run]\nsteps = true", "run.toml: run.steps: a truth value where another type is wanted"),
        ("[run]\nname = '../x'", "run.toml: run.name: String should match pattern"),
        ("[learner]\nlr = inf", "run.toml: learner.lr: Input should be a finite number"),
        ("[learner]\nbetas = [0.9]", "run.toml: learner.betas.1: Field required"),
        ("[model]\ndtype = 'float16'", "run.toml: model.dtype: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ("[evaluation]\nattempts = []", "run.toml: evaluation.attempts: Tuple should have at least 1 item"),
        ("[run\n", "run.toml: not valid TOML: "),
        # more than one key decides
        ("[dialogue]\nmin_attempts = 4\nmax_attempts = 2", "dialogue: min_attempts 4 is more than max_attempts 2"),
        ("[learner]\nbatch_dialogues = 100", "batch_dialogues 100 is not a multiple of minibatch_dialogues 128"),
        ("[dialogue]\nsystem_prompt = '{left}'", "dialogue: system_prompt may use {n} and {attempts} only"),
        ("[dialogue]\nfeedback_wrong = '\\boxed{}'", "dialogue: feedback_wrong may use {n} and {attempts} only"),
        ("[dialogue]\nfeedback_wrong = '{n.x}'", "dialogue: feedback_wrong may use {n} and {attempts} only"),
    ],
)
def test_a_mistake_in_the_file_names_file_key_and_remedy(tmp_path: Path, toml: str, message: str) -> None:
    assert message in mistake(tmp_path, toml)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learner.lrr", "1"], "--learner.lrr: unknown key learner.lrr, did you mean learner.lr?"),
        (["--run.steps"], "--run.steps: a value is missing"),
        (["--run.steps", "--run.seed", "3"], "--run.steps: a value is missing"),
        (["--steps", "3"], "--steps: expected --section.key value"),
        (["run.steps=3"], "run.steps=3: expected --section.key value"),
        (["--run.steps", "0"], "--run.steps: run.steps: Input should be greater than or equal to 1, got 0"),
        (["--evaluation.attempts=[0]"], "--evaluation.attempts: evaluation.attempts.0: Input should be greater"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path, flags: list[str], message: str) -> None:
    assert mistake(tmp_path, "", *flags).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MULTIATTEMPT_RUN__STEPS", "x", "environment variable MULTIATTEMPT_RUN__STEPS: run.steps: Input should be"),
        ("MULTIATTEMPT_RUN__STEP", "1", "environment variable MULTIATTEMPT_RUN__STEP: unknown key run.step, did you"),
        (
            "MULTIATTEMPT_GRADR__PORT",
            "1",
            "environment variable MULTIATTEMPT_GRADR__PORT: unknown section [gradr]",
        ),
        ("MULTIATTEMPT_STEPS", "1", "environment variable MULTIATTEMPT_STEPS: expected MULTIATTEMPT_SECTION__KEY"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(tmp_path: Path, name: str, value: str, message: str) -> None:
    assert mistake(tmp_path, "", env={name: value}).startswith(message)


def test_a_missing_file_is_told_which_ones_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").touch()
    with pytest.raises(ConfigError, match=r"demos\.toml: no such configuration file; configs here: configs/demo\.toml"):
        load(Path("demos.toml"), [], {})


def test_a_folder_in_place_of_a_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, [], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a resolved configuration"),
        ("{", "not JSON"),
        ('{"run": {"stepz": 1}}', r"run\.stepz: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_resolved_configuration_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_resolved(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_resolved(tmp_path / "other.json")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_and_section_says_what_it_is(section: str) -> None:
    kind = SECTIONS[section]
    assert kind is not None
    assert (kind.__doc__ or "").startswith(f"[{section}]")
    undocumented = [key for key, field in kind.model_fields.items() if not field.description]
    assert undocumented == []


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_cannot_be_changed_once_read(section: str) -> None:
    values = getattr(load(None, [], {}), section)
    with pytest.raises(ValueError, match="frozen"):
        setattr(values, next(iter(type(values).model_fields)), None)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--learner.checkpoint_best=eval_math500_accuracy"], "is of a test set; choose by dev_accuracy"),
        (["--learner.checkpoint_best=dev_accuracy"], "needs evaluation.every above 0"),
        (
            ["--learner.checkpoint_best=-dev_accuracy", "--evaluation.every=3", "--learner.checkpoint_every=8"],
            "every 3 updates .* learner.checkpoint_every, 8, must be a multiple",
        ),
        (
            ["--learner.checkpoint_best=dev_accuracy", "--evaluation.every=1", '--evaluation.sets=["gsm8k"]'],
            "heldout in evaluation.sets",
        ),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_is_measured_and_never_by_a_test_set(flags, told):
    with pytest.raises(ConfigError, match=f"^configuration: learner.checkpoint_best: .*{told}"):
        load(None, flags, env={})
    load(None, ["--learner.checkpoint_best=dev_accuracy", "--evaluation.every=4"], env={})
