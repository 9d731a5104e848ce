"""The report as one page that needs nothing else: no script and no network, on light and dark, on screen and paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from nai_xl.compare.comparison import Comparison, Row
from nai_xl.compare.figures import Drawn
from nai_xl.compare.runs import word
from nai_xl.compare.wording import DASH, about, answer, change, interval, narrower, number, p_value, percent, remarks

CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1f2329; --soft: #5f6773; --line: #e0e3e8;
  --good: #0064a0; --bad: #b54a00; --neither: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1e2228; --ink: #e8eaed; --soft: #a3abb7;
  --line: #363c45; --good: #62b8ee; --bad: #ff9a5c; --neither: #a3abb7 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; text-wrap: balance }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem }
.about { color: var(--soft); margin: 0 0 1.6rem }
.answers { display: grid; gap: .7rem; margin: 0 0 1.8rem; padding: 0 }
.answer { margin: 0; padding: .65rem 1rem; background: var(--card); border-left: 4px solid var(--neither);
  border-radius: 0 8px 8px 0; font-size: 1.08rem }
.answer b { display: inline-block; margin-right: .5rem }
.answer.better { border-color: var(--good) } .answer.worse { border-color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem }
th, td { padding: .42rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom;
  white-space: normal; line-height: 1.25 }
th:first-child, td:first-child { text-align: left }
.results :is(th, td):nth-child(2) { text-align: left }
.results td:is(:first-child, :nth-last-child(2)) { white-space: normal }
tbody th { font-weight: 600 }
tr.head th { padding-top: 1.1rem; font-size: 1.02rem; text-align: left }
tr.base td { color: var(--soft) }
.tag { color: var(--neither) }
.better .tag, .tag.better { color: var(--good); font-weight: 650 }
.worse .tag, .tag.worse { color: var(--bad); font-weight: 650 }
.higher .tag, .lower .tag { color: var(--ink); font-weight: 650 }
.notes { color: var(--soft); font-size: .92rem; white-space: normal; text-align: left }
figure { margin: 0 0 1.4rem } figure svg { width: 100%; height: auto; display: block }
figure img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 8px; padding: 6px }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .4rem }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
.how li { margin: .3rem 0 } code { font-size: .92em }
td.value { white-space: normal; overflow-wrap: anywhere; min-width: 6rem }
@media print { main { max-width: none; padding: 0 } h2 { break-after: avoid } figure { break-inside: avoid } }
"""

HOW_TO_READ = """
<ul class="how">
<li><b>Difference</b> is the arm minus the baseline, each seed of the arm against the same seed of the baseline: same
  images, noise and timesteps, and where a metric is a mean over items, item by item.</li>
<li><b>95 % interval</b>: Student's t with the variance over seeds and over items (crossed two-way layout,
  Satterthwaite's degrees of freedom). It is for this comparison alone.</li>
<li><b>p (Holm)</b> is adjusted for all arms and metrics here: a verdict needs it below 0.05, so an interval
  may leave out 0 while nothing is shown.</li>
<li><b>Narrower by pairing</b>: how many times wider the interval would be if each arm had seeds and items of its own;
  in brackets, with seeds of its own but the same items. Below 1, pairing has cost more than it gave.</li>
<li><b>No difference shown</b> is not "equal": the interval says which differences are still possible.</li>
<li>The percentile bootstrap is in results.csv for comparison. With few seeds it is too narrow to judge by.</li>
</ul>
"""


def page(found: Comparison, figures: Mapping[str, tuple[Drawn, str]]) -> str:
    """The whole document. `figures`: name -> figure and the sentence below it, in the order of the page; those whose
    name begins with "samples" after the first are folded away.
    """
    title = found.asked.question or f"{found.asked.name}: which arm is better?"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(about(found))}</p>',
        _answers(found),
        _results(found),
        _notes([*found.notes, *remarks(found)]),
        _figures(figures),
        _targets(found),
        _costs(found),
        _differences(found),
        "<h2>How to read this</h2>",
        HOW_TO_READ,
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
    )
    return f"{head}\n<body><main>\n{chr(10).join(filter(None, parts))}\n</main></body></html>\n"


def _answers(found: Comparison) -> str:
    lines = []
    for metric in found.metrics:
        verdicts = {row.verdict for row in found.of(metric)}
        side = next((words for words in ("worse", "better") if {words} == verdicts & {"better", "worse"}), "")
        lines.append(f'<p class="answer {side}"><b>{escape(metric)}</b>{_marked(answer(found, metric))}</p>')
    return f'<div class="answers">{"".join(lines)}</div>'


def _marked(sentence: str) -> str:
    """Verdicts in their colours."""
    return re.sub(r"\b(better|worse)\b", r'<span class="tag \1">\1</span>', escape(sentence))


# --- tables -----------------------------------------------------------------------------------------------------------

RESULT_COLUMNS = (
    "arm", "verdict", "mean", "difference", "", "95 % interval", "p (Holm)", "narrower by pairing", "seeds x items",
)  # fmt: skip


def _results(found: Comparison) -> str:
    body = []
    for metric in found.metrics:
        rows = found.of(metric)
        body.append(f'<tr class="head"><th colspan="{len(RESULT_COLUMNS)}">{escape(metric)}</th></tr>')
        means = [row.baseline_mean for row in rows if row.baseline_mean is not None]
        body.append(
            f'<tr class="base"><td>{escape(found.names[found.baseline])}</td><td>baseline</td>'
            f'<td>{number(means[0] if means else None)}</td><td colspan="{len(RESULT_COLUMNS) - 3}"></td></tr>'
        )
        body.extend(_result(row, found.names[row.arm]) for row in rows)
    return _table(RESULT_COLUMNS, "".join(body), ' class="results"')


def _result(row: Row, name: str) -> str:
    e = row.effect
    side = escape(row.verdict.replace(" ", "-"))
    cells = [
        f"<td>{escape(name)}</td>",
        f'<td class="tag">{escape(row.verdict)}</td>',
        f"<td>{number(row.mean)}</td>",
        f"<td>{change(e.difference) if e else DASH}</td>",
        f"<td>{percent(row)}</td>",
        f"<td>{interval(row)}</td>",
        f"<td>{p_value(row.p_holm)}</td>",
        f"<td>{narrower(row).replace(' x', '&nbsp;x').replace('seeds ', 'seeds&nbsp;')}</td>",
        f"<td>{f'{e.seeds} x {e.items}' if e and e.items > 1 else e.seeds if e else DASH}</td>",
    ]
    return f'<tr class="{side}">{"".join(cells)}</tr>'


def _table(columns: Iterable[str], body: str, kind: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _targets(found: Comparison) -> str:
    if not found.targets:
        return ""
    metric = found.targets[0].metric
    body = []
    for target in found.targets:
        reached = [images for images in target.images.values() if images is not None]
        mean = sum(target.baseline_images.values()) / len(target.baseline_images)
        own = f"{sum(reached) / len(reached):,.0f}" if reached else "not reached"
        times = target.ratio
        share = number(times[0]) if times else DASH
        between = f"{number(times[1])} to {number(times[2])}" if times and times[1] is not None else DASH
        body.append(
            _row(
                [
                    found.names[target.arm],
                    own,
                    f"{mean:,.0f}",
                    f"{len(reached)} of {len(target.images)}",
                    share,
                    between,
                ]
            )
        )
    columns = ("arm", "images, mean", "baseline", "seeds that reached it", "share of the baseline's", "95 % interval")
    return (
        f"<h2>Images needed to reach the baseline's last {escape(metric)}</h2>{_table(columns, ''.join(body))}"
        '<p class="notes">At the first evaluation that is as low. A description, not a test: an arm that is no better '
        "misses the target half of the time, and a share is given only where every seed reached it.</p>"
    )


def _costs(found: Comparison) -> str:
    columns = ("arm", "runs", "minutes a run", "images a run", "images/s", "peak memory, GiB")
    rows = [
        _row(
            [
                found.names[cost.arm],
                str(cost.runs),
                number(None if cost.seconds is None else round(cost.seconds / 60, 2)),
                DASH if cost.images is None else f"{cost.images:,.0f}",
                number(cost.images_per_second),
                number(cost.peak_memory_gib),
            ]
        )
        for cost in found.costs
    ]
    return f"<h2>Cost</h2>{_table(columns, ''.join(rows))}"


def _differences(found: Comparison) -> str:
    if not found.differences:
        return ""
    columns = ["setting", *(found.names[arm.label] for arm in found.arms)]
    body = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        f"{''.join(f'<td class=value>{escape(_shown(value))}</td>' for value in values)}</tr>"
        for key, values in found.differences.items()
    )
    return f"<h2>What differs in the arms' settings</h2>{_table(columns, body)}"


def _shown(value: object) -> str:
    return DASH if value is None else word(value)


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(figures: Mapping[str, tuple[Drawn, str]]) -> str:
    parts: list[str] = []
    folded: list[str] = []
    for name, (drawn, caption) in figures.items():
        content = drawn.svg or f'<img alt="{escape(caption)}" src="{data_uri(drawn.png)}">'
        made = f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
        again = name.startswith("samples") and any(part.startswith("<!--samples") for part in parts)
        (folded if again else parts).append(f"<!--{name}-->{made}")
    if folded:
        at = max(i for i, part in enumerate(parts) if part.startswith("<!--samples"))
        parts.insert(at + 1, f"<details><summary>Samples of the other seeds</summary>{''.join(folded)}</details>")
    return f"<h2>Figures</h2>{''.join(parts)}" if parts else ""


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
