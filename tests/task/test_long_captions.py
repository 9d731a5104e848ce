"""Captions that lose their end are counted and named at the start."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from nai_xl.data.captions import PlainCaptions
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.task import long_captions
from nai_xl.task.long_captions import may_exceed, told
from tests.test_train import run

TOKENIZER = tiny_sdxl(seed=0).tokenizers[0]
WORD = "red"  # one token


def items(*captions: str) -> Any:
    return [SimpleNamespace(caption=text, path=Path(f"{n}.png")) for n, text in enumerate(captions)]


def tokens(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)


@given(st.text(max_size=60))
def test_no_caption_that_is_too_long_is_passed_over(text: str) -> None:
    assert may_exceed(text, tokens(text) - 1) or not tokens(text)


@pytest.mark.parametrize("count", [75, 76, 150, 151, 300])
def test_what_is_cut_and_what_would_hold_it(count: int) -> None:
    end = " ".join([WORD] * (count - 76) + ["sky"])
    long = " ".join([WORD] * 75) + f" {end}"
    assert tokens(long) == max(count, 76)
    found = told(items("a cat", " ".join([WORD] * 75), long), PlainCaptions(), TOKENIZER, 1)
    assert len(found) == 1
    assert found[0].startswith("1 of 3 captions ")
    assert f"text.chunks={math.ceil(tokens(long) / 75)} holds" in found[0] and "2.png" in found[0]
    assert end[:60] in found[0]
    assert not told(items("a cat", long), PlainCaptions(), TOKENIZER, 5)


def test_what_is_put_before_a_caption_counts() -> None:
    captions = PlainCaptions(prefix="a very long beginning, " * 20)
    assert told(items("cat"), captions, TOKENIZER, 1)[0].startswith("1 of 1 ")


def test_of_many_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_captions, "LOOKED_AT", 10)
    many = items(*[f"{WORD} " * 100] * 25, *["short"] * 5)
    assert told(many, PlainCaptions(), TOKENIZER, 1)[0].startswith(
        "9 of 9 long captions that were looked at, among 30 captions, have more tokens than"
    )


def test_a_run_says_so_at_its_start(
    small: Callable[..., DictConfig], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "07.txt").write_text(f"{WORD} " * 299 + "the very end")
    run(small("run.max_images=2"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 12 captions have more tokens than the 75 of text.chunks=1" in printed
    assert "text.chunks=5 holds" in printed and "07.png" in printed
