"""A studio around a toy denoiser: everything an evaluator sees of a run, without a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nai_xl.data.cache import MemoryCache
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys
from nai_xl.data.loader import Encoded, LatentRef
from nai_xl.data.rows import Item
from nai_xl.diffusion.parameterization import V
from nai_xl.diffusion.sampling import Sampling
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import Bucket, Placement
from nai_xl.optimizer.ema import NoEma
from nai_xl.tracker.jsonl import NoTracker

CANVASES = [Bucket(32, 32), Bucket(48, 32), Bucket(32, 48)]


def toy(xt: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *, added_cond_kwargs: Any, return_dict: bool) -> Any:
    """Depends on everything that it is given."""
    extra = context.mean((1, 2)) + added_cond_kwargs["text_embeds"].mean(1) + added_cond_kwargs["time_ids"].mean(1) / 50
    return ((0.7 * xt + (t / 1000 + extra).to(xt.dtype)[:, None, None, None]).tanh(),)


def held_out(cache: MemoryCache, count: int) -> list[tuple[Item, LatentRef]]:
    pairs = []
    for number in range(count):
        bucket = CANVASES[number % 3]
        made = torch.Generator().manual_seed(number)
        shape = (4, bucket.height // 8, bucket.width // 8)
        cache.put(f"latent {number}", {"latents": 3 * torch.randn(shape, generator=made)})
        item = Item(Path(f"{number}.png"), f"caption {number}", (60, 40), f"{number:064x}")
        pairs.append((item, LatentRef(f"latent {number}", Placement(bucket, (60, 40), (2, 1), False))))
    return pairs


@pytest.fixture
def studio(tmp_path: Path) -> Callable[..., Studio]:
    """Makes a studio with 7 held-out images of three canvases; keyword arguments replace parts of it."""

    def make(**parts: Any) -> Studio:
        cache = MemoryCache()
        pairs = held_out(cache, 7)
        texts = TextKeys("made by this test")
        for n, (item, _) in enumerate(pairs):
            made = torch.Generator().manual_seed(100 + n)
            cache.put(
                texts(item.caption),
                {"context": torch.randn(77, 6, generator=made), "pooled": torch.randn(5, generator=made)},
            )
        mean, std = (
            torch.tensor([0.5, -0.2, 0.0, 1.0])[:, None, None],
            torch.tensor([2.0, 3.0, 1.0, 4.0])[:, None, None],
        )
        encoded = Encoded(Index([]), [], texts, cache, mean, std, torch.ones(0), pairs)

        def grey(latents: torch.Tensor) -> Sequence[Image.Image]:
            return [Image.new("RGB", (8 * x.shape[2], 8 * x.shape[1]), (128, 128, 128)) for x in latents]

        return Studio(
            **{
                "denoise": toy,
                "schedule": ztsnr(scaled_linear()),
                "parameterization": V(),
                "sampling": Sampling(),
                "condition": lambda text: (
                    encoded.condition(text) if texts(text) in cache else (torch.zeros(77, 6), torch.zeros(5))
                ),
                "decode": grey,
                "device": torch.device("cpu"),
                "ema": NoEma({}),
                "tracker": NoTracker(),
                "encoded": encoded,
                "square": Bucket(64, 64),
                "run_dir": tmp_path,
                **parts,
            }
        )

    return make
