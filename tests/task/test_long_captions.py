"""Captions that lose their end are counted and named at the start."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from nai_xl.data.captions import PlainCaptions
from nai_xl.data.rows import Item, Rows
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.precompute import precompute
from nai_xl.task import long_captions
from nai_xl.task.long_captions import may_exceed, told
from tests.test_train import run

TOKENIZER = tiny_sdxl(seed=0).tokenizers[0]
WORD = "red"  # one token


def items(*captions: str | tuple[str, ...]) -> Rows:
    """An image with each of these captions, or with several."""
    several = [(one,) if isinstance(one, str) else one for one in captions]
    return Rows.of(
        Item(Path(f"{n}.png"), first, (64, 64), f"{n:064x}", others=tuple(others))
        for n, (first, *others) in enumerate(several)
    )


def tokens(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)


@given(st.text(max_size=60))
def test_no_caption_that_is_too_long_is_passed_over(text: str) -> None:
    assert may_exceed(items(text), tokens(text) - 1).tolist() == [0] or not tokens(text)


def test_the_captions_of_an_image_belong_to_it_whichever_images_are_picked() -> None:
    rows = items("a" * 9, ("b", "c" * 9), "d", "e" * 9)
    assert may_exceed(rows, 5).tolist() == [0, 1, 3]
    assert may_exceed(rows, 5, added=5).tolist() == [0, 1, 2, 3]
    assert may_exceed(rows.take(np.array([3, 2, 1])), 5).tolist() == [0, 2]
    assert told(items("a cat", ("a dog", f"{WORD} " * 80)), PlainCaptions(), TOKENIZER, 1)[0].startswith("1 of 3 ")


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


def test_a_run_says_so_at_its_start_and_precompute_too(
    small: Callable[..., DictConfig], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "07.txt").write_text(f"{WORD} " * 299 + "the very end")
    cfg = small("run.max_images=2")
    for start in (lambda: precompute(cfg, {}), lambda: run(cfg)):
        start()
        printed = " ".join(capsys.readouterr().out.split())
        assert "1 of 12 captions have more tokens than the 75 of text.chunks=1" in printed
        assert "text.chunks=5 holds" in printed and "07.png" in printed
