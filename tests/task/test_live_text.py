"""text=live: the encoders in the step, and the same training as with text=cached."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from nai_xl.config.spec import Spec
from nai_xl.data.loader import PositionDataset
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch
from nai_xl.model.sdxl.components import fingerprint
from nai_xl.model.text import LiveEncoders, encode_texts
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.record.run_dir import RunDirectory
from tests.test_train import losses, rows, run, same_weights

Compose = Callable[..., DictConfig]
TEXTS = ["a red cup", "", "a cat, a dog, " * 12, "a red cup", "猫", "x " * 90, "sky", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def parts():  # type: ignore[no-untyped-def]
    return tiny_sdxl(seed=0)


def live(parts, chunks: int, dtype: torch.dtype = torch.float32) -> LiveEncoders:  # type: ignore[no-untyped-def]
    return LiveEncoders.of(parts.tokenizers, parts.text_encoders, chunks, torch.device("cpu"), dtype)


def batch(encoders: LiveEncoders, texts: list[str]) -> Batch:
    """As a loader makes it; nothing but the text is looked at."""
    some = torch.zeros(len(texts))
    return Batch(
        some, **encoders.tokens(texts), **dict.fromkeys(("time_ids", "weight", "position", "item", "u", "noise"), some)
    )


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_step_makes_the_conditions_that_would_be_cached(parts, chunks: int) -> None:  # type: ignore[no-untyped-def]
    made = live(parts, chunks).encoded(batch(live(parts, chunks), TEXTS))
    context, pooled = encode_texts(parts.tokenizers, parts.text_encoders, TEXTS, chunks=chunks)
    torch.testing.assert_close(made.context, context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert not made.context.requires_grad


def test_company_in_the_batch_does_not_show_in_a_single_bit(parts) -> None:  # type: ignore[no-untyped-def]
    encoders = live(parts, 2)
    together = encoders.encoded(batch(encoders, TEXTS))
    for row, text in enumerate(TEXTS):
        alone = encoders.encoded(batch(encoders, [text]))
        assert torch.equal(together.context[row], alone.context[0]) and torch.equal(
            together.pooled[row], alone.pooled[0]
        )
        context, pooled = encoders.condition(text)
        assert torch.equal(together.context[row], context) and torch.equal(together.pooled[row], pooled)


def test_what_occurs_twice_is_encoded_once(parts) -> None:  # type: ignore[no-untyped-def]
    told = live(parts, 3).tokens(["a red cup", "a red cup", "", "a cat"])
    assert told["tokens"].shape == (8, 2, 77)  # three captions and the empty chunk, filled up
    assert len(told["tokens"].flatten(1).unique(dim=0)) == 3 and told["chunks"].shape == (4, 3)
    assert live(parts, 3).tokens(TEXTS)["tokens"].shape[0] == 16


def test_the_encoders_that_are_delivered_stay_as_they_were(parts) -> None:  # type: ignore[no-untyped-def]
    before = [fingerprint(encoder) for encoder in parts.text_encoders]
    encoders = live(parts, 1, torch.bfloat16)
    context, _ = encoders.condition("a cat")
    assert {p.dtype for encoder in encoders.encoders for p in encoder.parameters()} == {torch.bfloat16}
    assert [fingerprint(encoder) for encoder in parts.text_encoders] == before
    exact, _ = encode_texts(parts.tokenizers, parts.text_encoders, ["a cat"], chunks=1)
    assert 0 < (context - exact[0]).norm() < 0.05 * exact.norm()


# --- whole runs -------------------------------------------------------------------------------------------------------

EVALUATED = ("evals=[sample_grid,val_loss]", "data.held_out=0.2", "evals.val_loss.every=2", "evals.val_loss.count=1")


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_is_the_same_with_either_text(small: Compose, images: Path, chunks: int) -> None:
    (images / "00.txt").write_text("a red cup on a table, " * 9)
    common = (f"text.chunks={chunks}", "run.max_images=8", "captions.dropout=0.3", *EVALUATED)
    cached, live = (rows(run(small(f"text={name}", f"name={name}", *common))) for name in ("cached", "live"))
    assert list(cached) == list(live) == [1, 2, 3, 4]
    for step, row in cached.items():
        for key, value in row.items():
            if key.startswith(("train/", "val/")):
                assert live[step][key] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, key)
    assert any(key.startswith("val/") for key in live[2])


def test_shuffled_tags_train_whoever_reads_and_however_often_it_stops(small: Compose, images: Path) -> None:
    for number in range(12):
        (images / f"{number:02d}.txt").write_text("red, green, blue, white, black")
    tags = ("captions=tags", "captions.tag_dropout=0.2", "text=live")
    whole = run(small(*tags, "run.max_images=8", "name=whole"))
    run(small(*tags, "run.max_images=4", "name=stopped", "run.checkpoint_every=2"))
    stopped = run(small(*tags, "run.max_images=8", "name=stopped", "run.workers=1"))
    assert losses(whole) == losses(stopped) and same_weights(whole, stopped)
    plain = run(small("text=live", "run.max_images=8", "name=plain"))
    assert losses(plain) != losses(whole)


def test_texts_that_cannot_be_listed_are_refused_before_any_weight_is_read(small: Compose) -> None:
    with pytest.raises(UserError, match="set text=live"):
        Spec.of(small("captions=tags"))
    Spec.of(small("captions=tags", "captions.shuffle=false"))


@pytest.mark.parametrize("computed", ["precision=bf16", "memory=[bf16_weights]"])
def test_conditions_kept_in_bfloat16_change_nothing_where_it_computes_in_bfloat16(
    small: Compose, computed: str
) -> None:
    common = ("run.max_images=6", computed, "optimizer=adamw_bf16" if "weights" in computed else "optimizer=adamw")
    kept = run(small(*common, "name=kept"))
    exact = run(small(*common, "name=exact", "text.dtype=fp32"))
    assert losses(kept) == losses(exact) and same_weights(kept, exact)


def test_float32_training_takes_conditions_kept_in_bfloat16(small: Compose) -> None:
    exact, kept = (losses(run(small("run.max_images=4", f"text.dtype={name}"))) for name in ("fp32", "bf16"))
    assert list(exact.values()) == pytest.approx(list(kept.values()), rel=0.02) and exact != kept


def test_bf16_with_live_text_delivers_the_encoders_whole(small: Compose) -> None:
    folder = run(small("run.max_images=4", "precision=bf16", "text=live"))
    parts = tiny_sdxl(seed=0)
    saved = load_file(folder / "pipeline" / "text_encoder_2" / "model.safetensors")
    assert torch.equal(saved["text_projection.weight"], parts.text_encoders[1].text_projection.weight)


def test_batches_for_compiling_look_like_those_of_the_data(small: Compose, tmp_path: Path) -> None:
    spec = Spec.of(small("text=live", "text.chunks=2"))
    spec.task.load(spec.model)
    strategy = spec.start()
    data = spec.task.prepare(spec.scan(), spec.cache, strategy, RunDirectory(tmp_path))
    made = list(data.one_of_each_shape(3))
    first = next(iter(data.batches(spec.run, strategy, start=0)))
    assert {one.canvas for one in made} >= {first.canvas} and len(made) == 3
    assert first.canvas[2] == 154
    for one in [first, *islice(made, 1)]:
        assert spec.task.loss(spec.task.components.unet, one).values.isfinite().all()
    assert data.encoded.texts is None
    assert PositionDataset(data.encoded, data.captions, 0, tokens=data.tokens)[0, 0].context.shape == (1, 0, 0)
