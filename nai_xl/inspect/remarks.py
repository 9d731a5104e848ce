"""What is worth knowing of the combinations, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nai_xl.inspect.combinations import Combination


def remarks(combinations: Sequence[Combination]) -> Iterator[str]:
    """Each sentence and refusal once, preceded by the combinations it is true of."""
    said = [*(s for c in combinations for s in c.sentences), *(c.refusal for c in combinations if c.refusal)]
    for sentence in dict.fromkeys(said):
        meant = [c.swept for c in combinations if sentence in c.sentences or sentence == c.refusal]
        refused = "refused: " if any(sentence == c.refusal for c in combinations) else ""
        of = described(meant, [c.swept for c in combinations])
        yield f"{of + ': ' if of else ''}{refused}{sentence}"


def described(meant: Sequence[Mapping[str, str]], everything: Sequence[Mapping[str, str]]) -> str:
    """These points of a grid as overrides that select them: 'schedule=ztsnr loss=minsnr,uniform'; '' for all."""
    values = {key: dict.fromkeys(point[key] for point in meant) for key in everything[0]}
    if [point for point in everything if all(point[key] in values[key] for key in values)] != list(meant):
        return "; ".join(" ".join(f"{key}={value}" for key, value in point.items() if value) for point in meant)
    telling = {key: v for key, v in values.items() if set(v) != {point[key] for point in everything}}
    named = {key: [value for value in v if value] for key, v in telling.items()}  # listed arms need not have every key
    return " ".join(f"{key}={','.join(v)}" for key, v in named.items() if v)
