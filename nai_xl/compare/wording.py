"""A comparison in words: its answer in sentences, its numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.judging.factorial import Contrast
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.judging.verdicts import (
    EQUAL,
    FAILED,
    IDENTICAL,
    NO_PAIRS,
    NO_VERDICT,
    NOT_MEASURED,
    ONE_SEED,
    TWO_SEEDS,
    UNDECIDED,
)  # fmt: skip
from nai_xl.compare.statistics.crossed import MOST_SEEDS

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: float | None, *, digits: int = 4) -> str:
    """`value` with so many significant digits, a true minus, and no exponent between 1e-4 and 1e9."""
    return DASH if value is None else _written(f"{value:.{digits}g}", f"{value:,.0f}", value)


def change(value: float) -> str:
    """`value` with three significant digits and a sign, except for 0."""
    return "0" if value == 0 else _written(f"{value:+.3g}", f"{value:+,.0f}", value)


def _written(short: str, whole: str, value: float) -> str:
    return (whole if "e+" in short and abs(value) < 1e9 else short).replace("-", MINUS)


def interval(row: Row) -> str:
    if row.effect is None or row.effect.low is None or row.effect.high is None:
        return DASH
    return f"{change(row.effect.low)} to {change(row.effect.high)}"


def narrower(row: Row) -> str:
    """'5.5 x (seeds 1.6 x)': how many times narrower pairing makes the interval; in brackets, that of seeds alone."""
    e = row.effect
    if e is None or e.factor is None:
        return DASH
    whole = f"{number(e.factor, digits=2)} x"
    return f"{whole} (seeds {number(e.factor_seeds, digits=2)} x)" if e.items > 1 and e.factor_seeds else whole


def p_value(p: float | None) -> str:
    return DASH if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def percent(row: Row) -> str:
    return "" if row.percent is None else percent_of(row.percent)


def percent_of(value: float, *, sign: bool = True) -> str:
    """Two digits, without exponents: +0.064 %, -12 %, +120 %; '<0.001 %' has no sign."""
    if value == 0:
        return "0 %"
    if abs(value) < 0.001:
        return "<0.001 %"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:{'+' if sign else ''}.{digits}f} %".replace("-", MINUS)


def about(found: Comparison) -> str:
    """'ztsnr: 3 arms, seeds 0, 1, 2. Baseline: schedule=scaled_linear.'"""
    seeds = sorted({seed for arm in found.arms for seed in [*arm.runs, *(run.seed for run in arm.failed)]})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{found.asked.name}: {len(found.arms)} arms, {named}. Baseline: {found.baseline}."


def said(row: Row) -> str:
    """The verdict with its number: 'equal within 2 %', 'undecided, about 9 seeds'."""
    if row.verdict == EQUAL:
        return f"equal within {in_words(row.margin or DASH)}"
    if row.verdict == UNDECIDED and row.seeds_needed:
        return f"undecided, about {row.seeds_needed} seeds"
    if row.verdict == UNDECIDED and row.effect and row.effect.items > 1:
        return "undecided, more items needed"
    return row.verdict


def in_words(size: str) -> str:
    """'2%' as a person reads it."""
    return size.replace("%", " %")


def answer(found: Comparison, metric: str) -> str:
    """One or two sentences: which arms are better or worse than the baseline, by how much, which are equal to it, and
    which are undecided or not judged.
    """
    rows, names = found.of(metric), found.names
    told: list[str] = []
    for words in ("better", "worse", "lower", "higher"):
        some = [row for row in rows if row.verdict == words]
        if some:
            some.sort(key=lambda row: abs(row.effect.difference) if row.effect else 0, reverse=True)
            than = "" if told else f" than {names[found.baseline]}"
            sized = _listed([f"{names[row.arm]} ({_size(row)})" for row in some])
            told.append(f"{sized} {'is' if len(some) == 1 else 'are'} {words}{than}")
    sentences = ["; ".join(told)] if told else []
    for words, sentence in (
        (EQUAL, "{arms} {is_are} equal to {baseline} within {margin}"),
        (IDENTICAL, "{arms} {is_are} identical to {baseline}"),
        (UNDECIDED, "Undecided: {arms}"),
        (NO_VERDICT, "No verdict on {arms}"),
        (TWO_SEEDS, "Two seeds are too few to judge {arms}"),
        (ONE_SEED, "One seed is too few to judge {arms}"),
        (FAILED, "There is no result of {arms}, which failed"),
        (NOT_MEASURED, "Not measured in {arms}"),
        (NO_PAIRS, "There are no pairs of runs for {arms}"),
    ):
        some = [row for row in rows if row.verdict == words]
        if some:
            arms = _listed([f"{names[row.arm]}{_limit(row)}" for row in some])
            verb = "is" if len(some) == 1 else "are"
            sentences.append(
                sentence.format(
                    arms=arms, is_are=verb, baseline=names[found.baseline], margin=in_words(some[0].margin or DASH)
                )
            )
    return " ".join(f"{sentence}." for sentence in sentences)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _size(row: Row) -> str:
    """In per cent of the baseline, or as it is if the baseline is 0."""
    return percent(row) or (change(row.effect.difference) if row.effect else "")


def _limit(row: Row) -> str:
    """In brackets: which differences are still possible for an undecided arm, and what would decide it; why an arm is
    not judged.
    """
    if row.verdict == NO_VERDICT:
        return f" ({row.withheld})"
    e = row.effect
    if row.verdict != UNDECIDED or e is None or e.low is None or e.high is None:
        return ""
    low, high = row.in_percent(e.low), row.in_percent(e.high)
    if low is None or high is None:
        possible = interval(row)
    else:
        possible = f"{percent_of(low).removesuffix(' %')} to {percent_of(high)}"
    return f" ({possible}; {_needed(row)})"


def _needed(row: Row) -> str:
    if row.seeds_needed:
        return f"would take about {row.seeds_needed} seeds"
    if row.effect and row.effect.items > 1:
        return "more seeds would not decide it, more items might"
    return f"{MOST_SEEDS} seeds would not decide it"


CONTRAST_COLUMNS = ("metric", "effect", "verdict", "size", "95 % interval", "p (Holm)")


def contrast_cells(one: Contrast) -> list[str]:
    """One row of the table of main effects and interactions."""
    e = one.effect
    if one.percent is not None:
        size, low, high = map(percent_of, one.percent)
        limits = f"{low.removesuffix(' %')} to {high}"
    else:
        size = change(e.difference)
        limits = DASH if e.low is None or e.high is None else f"{change(e.low)} to {change(e.high)}"
    return [one.metric, one.name, one.verdict, size, limits, p_value(one.p_holm)]


def remarks(found: Comparison) -> list[str]:
    """The rows' notes, each once, after the arm, and after its metrics unless the note holds for all of them."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for row in found.rows:
        for note in row.notes:
            metrics.setdefault((row.arm, note), []).append(row.metric)
    return [
        f"{found.names[arm]}{'' if len(of) == len(found.metrics) else f', {_listed(of)}'}: {note}"
        for (arm, note), of in metrics.items()
    ]


def markdown(found: Comparison) -> str:
    """The question, the answers and the table, short enough to stand in a README or in MLflow."""
    columns = ["metric", "arm", "verdict", "difference", "", "95 % interval", "p (Holm)", "narrower by pairing"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found.rows:
        cells = [row.metric, found.names[row.arm], said(row)]
        size = change(row.effect.difference) if row.effect else DASH
        cells += [size, percent(row), interval(row), p_value(row.p_holm), narrower(row)]
        rows.append(f"| {' | '.join(cells)} |")
    answers = [f"- **{metric}**: {answer(found, metric)}" for metric in found.metrics]
    if found.contrasts:
        rows += ["", f"| {' | '.join(CONTRAST_COLUMNS)} |", "|---" * len(CONTRAST_COLUMNS) + "|"]
        rows += [f"| {' | '.join(contrast_cells(one))} |" for one in found.contrasts]
    notes = [f"- {note}" for note in [*found.notes, *remarks(found)]]
    parts = [[found.asked.question or found.asked.name], [about(found)], answers, rows, notes]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"
