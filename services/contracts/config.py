"""RunConfig: one TOML file is one experiment. What can be set, and the defaults, are in `settings`.

Order of precedence: `--section.key value`, then `MULTIATTEMPT_SECTION__KEY` in the environment (or a file with the
value, named by `MULTIATTEMPT_SECTION__KEY_FILE`: secrets), then the TOML file, then the defaults. An unknown key is an
error that names the nearest valid one.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from services.contracts.settings import (
    ConsoleSection,
    DataSection,
    DialogueSection,
    EvaluationSection,
    GraderSection,
    LearnerSection,
    ModelSection,
    RedisSection,
    RolloutSection,
    RunSection,
    SamplingSection,
    TelemetrySection,
    WeightsSection,
)

ENV_PREFIX = "MULTIATTEMPT_"
FILE_SUFFIX = "_file"


class ConfigError(ValueError):
    """The user's configuration is wrong: one line that says what, where and how to mend it."""


class RunConfig(BaseSettings):
    """A whole experiment. A service reads only its own sections, the shared ones and nothing else."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", protected_namespaces=()
    )

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    dialogue: DialogueSection = DialogueSection()
    sampling: SamplingSection = SamplingSection()
    redis: RedisSection = RedisSection()
    grader: GraderSection = GraderSection()
    rollout: RolloutSection = RolloutSection()
    weights: WeightsSection = WeightsSection()
    learner: LearnerSection = LearnerSection()
    evaluation: EvaluationSection = EvaluationSection()
    console: ConsoleSection = ConsoleSection()
    telemetry: TelemetrySection = TelemetrySection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes: it merges file, environment and command line itself, to report errors by key."""
        return (init_settings,)

    @model_validator(mode="after")
    def _best_by_development(self) -> "RunConfig":
        best, every = self.learner.checkpoint_best.removeprefix("-"), self.evaluation.every
        if best.startswith("eval_"):
            raise ValueError(
                f"learner.checkpoint_best: {best} is of a test set; choose by dev_accuracy, of the held-out problems"
            )
        if best.startswith("dev_"):
            if not every or "heldout" not in self.evaluation.sets:
                raise ValueError(
                    f"learner.checkpoint_best: {best} needs evaluation.every above 0, and heldout in evaluation.sets"
                )
            if self.learner.checkpoint_every % every:
                raise ValueError(
                    f"learner.checkpoint_best: {best} is measured every {every} updates (evaluation.every); "
                    f"learner.checkpoint_every, {self.learner.checkpoint_every}, must be a multiple"
                )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run: metrics, checkpoints, plots, the embedded Valkey's data."""
        return self.run.dir / self.run.name


def load(
    path: Path | None,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    base: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Read a run's configuration.

    path: TOML file, or None for defaults. overrides: `["--learner.lr", "1e-4", ...]` (`--a.b=c` works too).
    env: the environment, `os.environ` by default. base: values in place of the defaults.
    Raises ConfigError with one line.
    """
    values: dict[str, dict[str, Any]] = _read_toml(path) if path else {}
    _check_keys(values, where=str(path))
    for section, keys in (base or {}).items():
        values[section] = {**keys, **values.get(section, {})}
    sources: dict[tuple[str, ...], str] = {}
    for source, section, key, value in [*_from_env(os.environ if env is None else env), *_from_flags(overrides)]:
        _check_keys({section: {key: value}}, where=source)
        values.setdefault(section, {})[key] = _parse_text(section, key, value)
        sources[section, key] = source
    try:
        return RunConfig(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(_first_line(error, path, sources)) from error


def to_toml_dict(config: RunConfig) -> dict[str, Any]:
    """The complete configuration as plain JSON-able values, to be kept with the run."""
    return config.model_dump(mode="json")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = sorted(str(p) for p in Path("configs").glob("*.toml"))
        hint = f"; configs here: {', '.join(found)}" if found else ""
        raise ConfigError(f"{path}: no such configuration file{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _from_env(env: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    found = []
    for name, value in sorted(env.items()):
        if name.startswith(ENV_PREFIX):
            section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
            if not key:
                raise ConfigError(f"environment variable {name}: expected {ENV_PREFIX}SECTION__KEY")
            if key.endswith(FILE_SUFFIX):
                key, value = key.removesuffix(FILE_SUFFIX), _read_secret(name, value)
            found.append((f"environment variable {name}", section, key, value))
    return found


def secret_from_env(name: str, env: Mapping[str, str] | None = None) -> str:
    """The environment variable `name`, or what is in the file that `name`_FILE names; else "". Raises ConfigError."""
    env = os.environ if env is None else env
    path = env.get(f"{name}{FILE_SUFFIX.upper()}", "")
    return _read_secret(f"{name}{FILE_SUFFIX.upper()}", path) if path else env.get(name, "")


def _read_secret(name: str, path: str) -> str:
    """Without the line break at its end."""
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"environment variable {name}: {path}: {reason}") from error


def _from_flags(flags: Sequence[str]) -> list[tuple[str, str, str, str]]:
    found = []
    queue = list(flags)
    while queue:
        flag = queue.pop(0)
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or "." not in name:
            raise ConfigError(f"{flag}: expected --section.key value, for example --learner.lr 1e-4")
        if not equals:
            if not queue or queue[0].startswith("--"):  # a text that begins so is given as --section.key=--text
                raise ConfigError(f"{name}: a value is missing")
            value = queue.pop(0)
        section, _, key = name.removeprefix("--").replace("-", "_").partition(".")
        found.append((name, section, key, value))
    return found


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    for section, keys in values.items():
        field = RunConfig.model_fields.get(section)
        if field is None:
            hint = _elsewhere(section) or _nearest(section, RunConfig.model_fields)
            raise ConfigError(f"{where}: unknown section [{section}]{hint}")
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{where}: {section} is a section, write its keys under [{section}]")
        known = _section_type(section).model_fields
        for key in keys:
            if key not in known:
                hint = _elsewhere(key) or _nearest(key, known, prefix=f"{section}.")
                raise ConfigError(f"{where}: unknown key {section}.{key}{hint}")


def _section_type(section: str) -> type[BaseModel]:
    annotation = RunConfig.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _elsewhere(key: str) -> str:
    """A hint when the key exists, in another section."""
    homes = [section for section in RunConfig.model_fields if key in _section_type(section).model_fields]
    return f", did you mean {homes[0]}.{key}?" if homes else ""


def _nearest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known)}"


def _parse_text(section: str, key: str, text: str) -> Any:
    """Text from a flag or the environment as a TOML value where it is one (numbers, booleans, lists), else as is."""
    if _section_type(section).model_fields[key].annotation in (str, Path):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _first_line(error: ValidationError, path: Path | None, sources: Mapping[tuple[str, ...], str] | None = None) -> str:
    """The first mistake: where it was written (`sources` by section and key, else the file), what and what it was."""
    first = error.errors()[0]
    parts = tuple(str(part) for part in first["loc"])
    written = (sources or {}).get(parts[:2]) or path or "configuration"
    given = "" if isinstance(first["input"], dict | BaseModel) else f", got {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    if not parts:  # of several sections together: the message names them
        return f"{written}: {message}"
    return f"{written}: {'.'.join(parts)}: {message}{given}"


def load_resolved(path: Path) -> RunConfig:
    """Read a service's configuration: the resolved one that the launcher wrote (JSON), which is taken as it is; or,
    where nothing launches (containers), the experiment's own TOML file with the environment over it.

    Raises ConfigError.
    """
    if path.suffix == ".toml":
        return load(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; services read the config.json that the launcher writes") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a resolved configuration, but a {type(values).__name__}")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(_first_line(error, path)) from error


def model_path(config: RunConfig) -> Path:
    """Folder of the prepared starting model. Raises ConfigError when it was not prepared."""
    note = config.run_dir / "model.json"
    try:
        return Path(json.loads(note.read_text(encoding="utf-8"))["path"])
    except FileNotFoundError as error:
        raise ConfigError(
            f"{note}: the model is not prepared; run `python -m services.learner.prepare` first"
        ) from error
