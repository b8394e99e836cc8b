"""What an evaluation leaves for people: results.json, results.md and the pictures, beside its dialogues."""

from pathlib import Path

import msgspec

from services.contracts.config import ConfigError
from services.evaluation.asking import Tally
from services.evaluation.compare import Comparison, Evaluated
from services.evaluation.compare import markdown as comparison_page
from services.evaluation.journal import read_dialogues, read_header, write_whole
from services.evaluation.plan import Ask
from services.evaluation.report import markdown
from services.evaluation.summary import Results, Speed, summarise

RESULTS, PAGE = "results.json", "results.md"
COMPARISON, COMPARISON_PAGE = "comparison.json", "comparison.md"


def speed_of(tally: Tally) -> Speed | None:
    """Of this start; None when everything was there already."""
    if not tally.num_new:
        return None
    return Speed(
        dialogues=tally.num_new,
        seconds=tally.seconds,
        dialogues_per_s=tally.num_new / tally.seconds,
        sampled_tokens_per_s=tally.num_tokens / tally.seconds,
    )


def write_results(folder: Path, asked: list[Ask], tally: Tally) -> Results:
    """Compute and write everything. The speed of an earlier start stays where this one asked for nothing."""
    wanted = {ask.key for ask in asked}
    dialogues = [dialogue for dialogue in read_dialogues(folder) if dialogue.key in wanted]
    speed = speed_of(tally) or _earlier_speed(folder)
    results = summarise(read_header(folder), dialogues, speed=speed)
    write_whole(folder / RESULTS, msgspec.json.format(msgspec.json.encode(results), indent=1))
    write_whole(folder / PAGE, markdown(results).encode())
    draw_results([results], folder)
    return results


def draw_results(results: list[Results], folder: Path) -> list[Path]:
    """The pictures. matplotlib is imported only here."""
    from services.evaluation.figures import draw

    return draw(results, folder)


def read_results(folder: Path) -> Results:
    """Raises ConfigError when the evaluation is not finished, or not one of this version."""
    read_header(folder)
    try:
        return msgspec.json.decode((folder / RESULTS).read_bytes(), type=Results)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: not finished; repeat its command to go on with it") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{folder / RESULTS}: not results of this version: {error}") from error


def read_evaluated(folder: Path) -> Evaluated:
    """A finished evaluation with its dialogues. Raises ConfigError."""
    return Evaluated(read_results(folder).header, read_dialogues(folder))


def write_comparison(folder: Path, comparison: Comparison) -> str:
    """Returns the page. Raises ConfigError when the folder cannot be written to."""
    page = comparison_page(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / COMPARISON, msgspec.json.format(msgspec.json.encode(comparison), indent=1))
        write_whole(folder / COMPARISON_PAGE, page.encode())
    except OSError as error:
        raise ConfigError(f"--output: {folder}: {error.strerror}") from error
    return page


def _earlier_speed(folder: Path) -> Speed | None:
    return read_results(folder).speed if (folder / RESULTS).exists() else None
