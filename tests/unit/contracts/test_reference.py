"""docs/configuration.md is what the settings say."""

from pathlib import Path

from services.contracts.config import RunConfig
from services.contracts.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_configuration_reference_is_current() -> None:
    told = "docs/configuration.md is out of date: python -m services.contracts.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), told


def test_every_setting_has_its_row_with_type_default_and_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    settings = sum(len(field.annotation.model_fields) for field in RunConfig.model_fields.values())  # type: ignore[union-attr]
    assert len(rows) == settings
    for row in rows:
        key, kind, default, meaning = (cell.strip() for cell in row.strip("|").split(" | "))
        assert kind and default and len(meaning) > 5, key
    assert "| `lr` | number, above 0 | `5e-07` | Actor, peak. |" in rows
