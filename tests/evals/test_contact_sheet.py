"""Contact sheets are taken apart as they were made."""

import pytest
from PIL import Image

from nai_xl.evals.contact_sheet import Prompt, cells, contact_sheet
from nai_xl.interfaces import Bucket
from tests.synthetic import blob


@pytest.mark.parametrize("count", [1, 3, 4, 6, 12])
@pytest.mark.parametrize("references", [True, False])
def test_contact_sheets_are_taken_apart_as_they_were_made(count: int, references: bool) -> None:
    prompts = [Prompt(f"number {i}", Bucket(96, 96), blob(100 + i, 0) if references else None) for i in range(count)]
    samples = [blob(i, 50) for i in range(count)]
    apart = cells(contact_sheet(prompts, samples))
    assert len(apart) == count
    for cell, prompt, sample in zip(apart, prompts, samples, strict=True):
        assert cell.sample.tobytes() == sample.tobytes()
        assert (cell.reference.tobytes() if cell.reference else None) == (
            prompt.reference.tobytes() if prompt.reference else None
        )


@pytest.mark.parametrize("side", [64, 128])
def test_a_long_prompt_stays_below_its_own_picture(side: int) -> None:
    def second(first: str) -> bytes:
        prompts = [Prompt(text, Bucket(side, side)) for text in (first, "a completely red image")]
        sheet = contact_sheet(prompts, [Image.new("RGB", (side, side)) for _ in prompts])
        return cells(sheet)[1].caption.tobytes()

    assert second("short") == second("an extraordinarily long prompt " * 20) == second("pneumono" * 20)


def test_a_picture_of_another_layout_is_no_contact_sheet() -> None:
    assert cells(Image.new("RGB", (501, 333))) == []
