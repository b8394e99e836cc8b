"""The configuration reference, out of the settings models: `python -m services.contracts.reference`.

docs/configuration.md holds what this writes; a test says whether it still does.
"""

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from services.contracts.config import ENV_PREFIX, RunConfig

_INTRODUCTION = f"""# Configuration

One TOML file is one experiment (`configs/`); every setting has a default. What counts, in this order: `--section.key
value` on the command line, `{ENV_PREFIX}SECTION__KEY` in the environment, the TOML file, the default. An unknown key is
an error that names the nearest one. The launcher writes what it resolved to `config.json` in the run's folder, and all
services read that.

A secret is best kept in a file: `{ENV_PREFIX}SECTION__KEY_FILE` names one that holds the value.

This page is made from the models in `services/contracts/settings.py`: `python -m services.contracts.reference`.
"""
_WORDS: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


def reference() -> str:
    """The page, as Markdown."""
    parts = [_INTRODUCTION]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        title = " ".join((section.__doc__ or "").split()).removeprefix(f"[{name}]").strip()
        parts.append(f"\n## [{name}]\n\n{title[:1].upper()}{title[1:]}\n\n")
        parts.append("| key | what it may be | default | what it means |\n|---|---|---|---|\n")
        parts += [_row(key, one) for key, one in section.model_fields.items()]
    return "".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    cells = (f"`{key}`", _type(field.annotation, field.metadata), _default(field.default), meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [part for extra in arguments[1:] for part in getattr(extra, "metadata", [extra])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part, []) for part in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f"list of {_type(arguments[0], [])}"
        return f"[{', '.join(_type(part, []) for part in arguments)}]"
    return f"{_WORDS.get(annotation, 'none')}{_bounds(metadata)}"


def _bounds(metadata: list[Any]) -> str:
    said = []
    for bound in metadata:
        for kind, name, words in (
            (Ge, "ge", "at least"),
            (Gt, "gt", "above"),
            (Le, "le", "at most"),
            (Lt, "lt", "below"),
        ):
            if isinstance(bound, kind):
                said.append(f"{words} {getattr(bound, name)}")
    return f", {', '.join(said)}" if said else ""


def _default(value: Any) -> str:
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str | Path):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
