"""A comparison in words: its answer in sentences, its numbers as a person reads them."""

from __future__ import annotations

from nai_xl.report.comparison import FAILED, NO_PAIRS, NOT_MEASURED, Comparison, Row
from nai_xl.report.paired import NO_DIFFERENCE, ONE_SEED

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: float | None, *, digits: int = 4) -> str:
    """So many digits, with a true minus, and no exponent from a thousandth to a thousand million."""
    return DASH if value is None else _written(f"{value:.{digits}g}", f"{value:,.0f}", value)


def change(value: float) -> str:
    """Three digits and a sign; 0 has none."""
    return "0" if value == 0 else _written(f"{value:+.3g}", f"{value:+,.0f}", value)


def _written(short: str, whole: str, value: float) -> str:
    return (whole if "e+" in short and abs(value) < 1e9 else short).replace("-", MINUS)


def interval(row: Row) -> str:
    if row.effect is None or row.effect.low is None or row.effect.high is None:
        return DASH
    return f"{change(row.effect.low)} to {change(row.effect.high)}"


def p_value(p: float | None) -> str:
    return DASH if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def percent(row: Row) -> str:
    if row.percent is None:
        return ""
    return "0 %" if row.percent == 0 else f"{row.percent:+.2g} %".replace("-", MINUS)


def answer(found: Comparison, metric: str) -> str:
    """One or two sentences: who is better or worse than the baseline and by how much, and of whom nothing is shown."""
    rows = found.of(metric)
    said: list[str] = []
    for words in ("better", "worse", "lower", "higher"):
        some = [row for row in rows if row.verdict == words]
        if some:
            some.sort(key=lambda row: abs(row.effect.difference) if row.effect else 0, reverse=True)
            than = f"{words} than {found.baseline}" if not said else words
            said.append(f"{'; '.join(map(_with_size, some))} {'is' if len(some) == 1 else 'are'} {than}")
    sentence = f"{' and '.join(said)}." if said else ""
    rest = [row for row in rows if row.verdict not in ("better", "worse", "lower", "higher")]
    other = []
    for words, before in (
        (NO_DIFFERENCE, "No difference is shown for"),
        (ONE_SEED, "One seed is too few to judge"),
        (FAILED, "Failed:"),
        (NOT_MEASURED, "Not measured in"),
        (NO_PAIRS, "No pairs of runs for"),
    ):
        some = [row for row in rest if row.verdict == words]
        if some:
            other.append(f"{before} {'; '.join(_with_limit(row) for row in some)}")
    return " ".join(part for part in (sentence, f"{'. '.join(other)}." if other else "") if part)


def _with_size(row: Row) -> str:
    """'loss=minsnr (-0.012, -3.1 %; 95 % interval -0.016 to -0.008)'."""
    assert row.effect is not None
    size = ", ".join(filter(None, [change(row.effect.difference), percent(row)]))
    return f"{row.arm} ({size}; 95 % interval {interval(row)})"


def _with_limit(row: Row) -> str:
    """Of an arm that shows nothing: how large a difference could have hidden."""
    if row.verdict != NO_DIFFERENCE or row.effect is None or row.effect.low is None or row.effect.high is None:
        return row.arm
    if row.effect.low == row.effect.high:
        return f"{row.arm} (equal to the last digit)"
    return f"{row.arm} (95 % interval {interval(row)})"


def remarks(found: Comparison) -> list[str]:
    """The rows' notes, each once: before the arm alone where it holds for all of the arm's metrics."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for row in found.rows:
        for note in row.notes:
            metrics.setdefault((row.arm, note), []).append(row.metric)
    return [
        f"{arm}: {note}" if len(of) == len(found.metrics) else f"{arm}, {', '.join(of)}: {note}"
        for (arm, note), of in metrics.items()
    ]
