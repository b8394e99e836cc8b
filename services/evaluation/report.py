"""Results as Markdown: results.md, for people. All figures are in results.json too."""

from collections.abc import Iterable, Sequence

from services.evaluation import published
from services.evaluation.benchmarks import PAPER
from services.evaluation.statistics import Estimate
from services.evaluation.summary import Curve, Point, Results

READING = """Accuracies are in %, with 95 % intervals: bootstrap over problems, seeds of one problem averaged first.
Benchmarks are averaged unweighted. Recovered: solved, given that the first attempt failed. Repeated: attempts after a
wrong answer that give it again. Tokens are sampled tokens. Resampling draws independent single attempts and stops at
the first correct one, by the same oracle that the dialogues' feedback comes from; it is compared where it costs as many
tokens as the dialogues: only what is above it is due to feedback."""
OTHER_DECODING = """The samples were drawn at another temperature than the dialogues, so a part of the gain is the
decoding's: the row with one attempt, where there is no feedback yet, shows how much."""
NO_TRUTH = """The model was not told whether it was right: it made all its attempts, and its last answer counts. In
brackets, what an oracle could have picked from all of them."""


def markdown(results: Results) -> str:
    """The whole page."""
    parts = [f"# {results.header.model}", _settings(results), "## Accuracy against allowed attempts", accuracy(results)]
    if any(n > 1 for n in results.header.settings.attempts):
        parts += ["## Beyond the first attempt", _beyond(results)]
    if results.header.settings.samples:
        parts += ["## Independent samples (pass@k)", _pass_at(results)]
    parts += ["## Reading this", READING]
    settings = results.header.settings
    if settings.feedback == "none":
        parts.append(NO_TRUTH)
    elif settings.samples and settings.sample_temperature != settings.temperature:
        parts.append(OTHER_DECODING)
    parts += [f"- {trouble}" for trouble in troubles(results)]
    return "\n\n".join(parts) + "\n"


def accuracy(results: Results) -> str:
    """The main table: a row for each benchmark, a column for each N, the paper's curves below those they belong to."""
    attempts = results.header.settings.attempts
    lines = _head(["benchmark", "problems", *(f"{n} attempt{'s' * (n > 1)}" for n in attempts)])
    for name, curve in results.curves.items():
        lines.append(_row([curve.title, str(curve.num_problems), *(_accuracy(results, p) for p in curve.points)]))
        if name in published.CURVES:
            lines += [_published(label, published.CURVES[name][model], attempts) for model, label in _papers()]
    if len(results.curves) > 1:
        lines.append(_row(["**average**", "", *(percent(point.accuracy) for point in results.average)]))
        if set(results.curves) == set(PAPER):
            lines += [_published(label, published.average(model), attempts) for model, label in _papers()]
    return "\n".join(lines)


def troubles(results: Results) -> list[str]:
    """What a reader should know: dialogues that were refused, cut off, or judged too slowly."""
    found = []
    for curve in results.curves.values():
        dialogues = curve.num_problems * results.header.settings.seeds
        for point in curve.points:
            where = f"{curve.title}, {point.max_attempts} allowed attempt{'s' * (point.max_attempts > 1)}"
            if point.refused:
                found.append(f"{where}: {point.refused} of {dialogues} dialogues could not be run (counted unsolved)")
            if timeouts := point.verdicts.get("timeout", 0):
                found.append(f"{where}: {timeouts} answers could not be compared in time (counted wrong)")
            if point.truncated > dialogues / 10:
                found.append(f"{where}: {point.truncated} of {dialogues} dialogues ran out of tokens")
    return found


def percent(estimate: Estimate) -> str:
    """`45.2 (40.1 to 50.3)`, in %; a dash where there is nothing."""
    return number(estimate, scale=100.0, digits=1)


def number(estimate: Estimate, *, scale: float = 1.0, digits: int = 0, sign: str = "") -> str:
    """Value and interval."""
    if estimate.value is None:
        return "-"
    form = f"{sign}.{digits}f"
    value = f"{scale * estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({scale * estimate.low:{form}} to {scale * estimate.high:{form}})"


def p_value(p: float) -> str:
    """Three digits, or that it is below what they show."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join([*_head(head), *(_row(row) for row in rows)])


def _settings(results: Results) -> str:
    settings, header = results.header.settings, results.header
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    lines = [
        f"- weights: {', '.join(f'{name} {value}' for name, value in header.weights.items() if value is not None)}",
        f"- {how}; {settings.seeds} dialogue{'s' * (settings.seeds > 1)} for each problem and number of attempts",
        f"- feedback: {'from the gold answer' if settings.feedback == 'truth' else 'none'}; seed {settings.seed}",
    ]
    if settings.samples:
        lines.append(f"- {settings.samples} independent samples, temperature {settings.sample_temperature:g}")
    if settings.problems is not None:
        lines.append(f"- at most {settings.problems} problems of each benchmark, drawn at random")
    if results.speed is not None:
        speed = results.speed
        lines.append(
            f"- {speed.dialogues:,} dialogues in {speed.seconds:.0f} s: {speed.dialogues_per_s:.1f} dialogues/s, "
            f"{speed.sampled_tokens_per_s:,.0f} sampled tokens/s"
        )
    return "\n".join(lines)


def _accuracy(results: Results, point: Point) -> str:
    told = percent(point.accuracy)
    if results.header.settings.feedback == "none" and point.accuracy_any.value is not None:
        told += f" [{100 * point.accuracy_any.value:.1f}]"
    return told


def _beyond(results: Results) -> str:
    head = ["benchmark", "attempts", "at the first", "recovered", "repeated", "tokens", "tokens per solved"]
    compared = results.header.settings.samples and results.header.settings.feedback == "truth"
    if compared:
        head += ["samples for as many tokens", "resampling", "gain over it"]
    rows = []
    for curve in results.curves.values():
        for point in curve.points:
            cells = [
                curve.title,
                str(point.max_attempts),
                percent(point.accuracy_first),
                percent(point.recovered),
                percent(point.repeated),
                f"{point.tokens_per_dialogue:.0f}",
                number(point.tokens_per_solved),
            ]
            rows.append([*cells, *(_same_tokens(point, curve) if compared else ())])
    return table(head, rows)


def _same_tokens(point: Point, curve: Curve) -> list[str]:
    same = point.same_tokens
    assert same is not None
    if same.samples is None:
        return [f"above {len(curve.pass_at)}", "-", "-"]
    return [f"{same.samples:.1f}", percent(same.accuracy), number(same.gain, scale=100.0, digits=1, sign="+")]


def _pass_at(results: Results) -> str:
    shown = [k for k in range(1, results.header.settings.samples + 1) if k <= 8 or k & (k - 1) == 0]
    rows = [[c.title, *(percent(c.pass_at[k - 1].accuracy) for k in shown)] for c in results.curves.values()]
    return table(["benchmark", *(f"k = {k}" for k in shown)], rows)


def _papers() -> list[tuple[str, str]]:
    return list(published.LABELS.items())


def _published(label: str, curve: Sequence[float], attempts: Sequence[int]) -> str:
    by_attempts = dict(zip(published.ATTEMPTS, curve, strict=True))
    return _row([f"*{label}*", "", *(f"*{by_attempts[n]:.1f}*" if n in by_attempts else "" for n in attempts)])


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|---|" + "---:|" * (len(names) - 1)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
