"""A sweep over losses whose effects are known."""

from collections.abc import Callable

from PIL import Image

from nai_xl.evals.contact_sheet import Prompt, contact_sheet
from nai_xl.interfaces import Bucket
from tests.synthetic import blob

QUESTION = "Which loss is <best> & why?"
METRICS = ["val/loss", "color/error"]
BASE, GOOD, SAME, BAD, LOST = ({"loss": name} for name in ("uniform", "minsnr", "edm", "p2", "debiased"))
EFFECTS = {
    "uniform": {"val/loss": 0.0, "color/error": 0.0},
    "minsnr": {"val/loss": -0.05, "color/error": 0.0},
    "edm": {"val/loss": 0.0, "color/error": 0.0},
    "p2": {"val/loss": 0.05, "color/error": -0.08},
    "debiased": {"val/loss": 0.0, "color/error": 0.0},
}
ASKED = {"name": "losses", "question": QUESTION, "baseline": "loss=uniform", "metrics": METRICS}
Command = Callable[..., str]


def sheet(shade: int) -> Image.Image:
    prompts = [Prompt(f"disc {i}", Bucket(96, 96), blob(i, 0)) for i in range(6)]
    return contact_sheet(prompts, [blob(i, shade) for i in range(6)])
