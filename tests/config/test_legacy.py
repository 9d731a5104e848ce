"""Runs that version 0.1 made are runs of this version: read, told apart, and continued where they lie.

stored_by_0_1/ holds config.yaml files that 0.1 has written (their output_dir and tracker.uri are made neutral), and the
names of all targets of its yaml files.
"""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.config import identity, legacy
from nai_xl.distributed.precision import MixedPrecision
from nai_xl.errors import UserError
from tests.config.options import composed

STORED = Path(__file__).parent / "stored_by_0_1"
TARGETS = (STORED / "targets.txt").read_text().split()
HALF = "bucketing.scheme=half"  # the buckets that 0.1 had
# the file -> what makes the same run today, and the directory in which 0.1 had it
RUNS = {
    "default": ((HALF,), "tiny-ztsnr-v-minsnr-2816015e"),
    "gpu_12gb": (("hardware=gpu_12gb", HALF), "tiny-ztsnr-v-minsnr-107ec805"),
    "bf16": (("precision=bf16", "loss=uncertainty", "lr.warmup=3", HALF), "tiny-ztsnr-v-uncertainty-bbe5dce9"),
}
every_run = pytest.mark.parametrize("name", RUNS)


def stored(name: str) -> DictConfig:
    loaded = OmegaConf.load(STORED / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_0_1_is_found(target: str) -> None:
    found = config.locate(target)
    assert found.__name__ == legacy.moved(target).rpartition(".")[2]
    assert config.locate(legacy.moved(target)) is found


def test_the_table_of_moved_targets_has_nothing_that_0_1_did_not_have() -> None:
    assert len(TARGETS) > 70
    assert {*legacy.MOVED} <= {*TARGETS}
    assert not {*legacy.MOVED} & {*legacy.MOVED.values()}


@every_run
def test_a_stored_config_is_upgraded_to_todays(name: str) -> None:
    before = stored(name)
    cfg = config.upgraded(before)
    today = composed(*RUNS[name][0])
    assert before == stored(name)  # itself unchanged
    assert "mixed_precision" not in cfg.run
    assert config.build(cfg.precision) == MixedPrecision(before.run.mixed_precision)
    added = {group for group in legacy.ADDED if group not in today}
    assert {*cfg} - added == {*today}
    config.check(OmegaConf.masked_copy(cfg, [key for key in cfg if key not in added]))
    assert config.upgraded(cfg) == cfg


@every_run
def test_a_stored_run_has_the_signature_of_the_same_run_today(name: str) -> None:
    overrides, _ = RUNS[name]
    assert config.signature(config.upgraded(stored(name))) == config.signature(composed(*overrides))
    others = [config.signature(config.upgraded(stored(other))) for other in RUNS if other != name]
    assert config.signature(composed(*overrides)) not in others


def test_a_group_added_later_keeps_the_signature_of_runs_without_it() -> None:
    plain = composed()
    without = OmegaConf.masked_copy(plain, [key for key in plain if key not in legacy.ADDED])
    added = OmegaConf.merge(OmegaConf.to_container(without), legacy.ADDED)
    assert isinstance(added, DictConfig)
    assert config.signature(added) == config.signature(without) == config.signature(plain)
    added.adapter = {"_target_": "nai_xl.adapter.lora.lora", "_partial_": True}
    assert config.signature(added) != config.signature(plain)


# --- run directories --------------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """The run directories as 0.1 left them."""
    for name, (_, folder) in RUNS.items():
        (tmp_path / folder).mkdir()
        shutil.copy(STORED / f"{name}.yaml", tmp_path / folder / "config.yaml")
        note = {"sweep": None, "arm": {}, "seed": 0, "signature": folder[-8:]}
        (tmp_path / folder / "arm.json").write_text(json.dumps(note))
    return tmp_path


def place(outputs: Path, *overrides: str) -> Path:
    (point,) = config.combinations([f"output_dir={outputs}", *overrides])
    return config.run_dir(point[2], point[1])


@every_run
def test_a_run_of_0_1_is_continued_where_it_lies(name: str, outputs: Path) -> None:
    overrides, folder = RUNS[name]
    assert place(outputs, *overrides) == outputs / folder
    assert place(outputs, *overrides, "run.max_images=20000", "tracker=jsonl") == outputs / folder  # longer
    other = place(outputs, *overrides, "run.seed=1")
    assert other.parent == outputs and not other.exists()


def test_a_run_with_the_defaults_of_an_earlier_version_is_named(outputs: Path) -> None:
    def former(*overrides: str) -> tuple[Path, str] | None:
        (point,) = config.combinations([f"output_dir={outputs}", *overrides])
        return config.begun_with_former(point[2], point[1])

    assert former() == (outputs / RUNS["default"][1], HALF)
    assert former(HALF) is None and former("run.seed=1") is None and former("bucketing=square") is None


@pytest.mark.parametrize("begun", [["text.chunks=3"], ["text.chunks=3", HALF]], ids=["text", "text and buckets"])
def test_a_run_that_was_begun_with_cached_text_is_named(begun: list[str], outputs: Path) -> None:
    (outputs / place(outputs, *begun).name).mkdir()
    (point,) = config.combinations([f"output_dir={outputs}", "text=live", "text.chunks=3"])
    words = "text=cached" if len(begun) == 1 else f"{HALF} text=cached"
    assert config.begun_with_former(point[2], point[1]) == (place(outputs, *begun), words)
    (other,) = config.combinations([f"output_dir={outputs}", "text=live", "text.chunks=2"])
    assert config.begun_with_former(other[2], other[1]) is None


def test_a_stored_config_of_0_1_has_the_buckets_that_it_was_trained_on() -> None:
    assert "scheme" not in stored("default").bucketing
    now, before = (config.build(cfg.bucketing) for cfg in (composed(), config.upgraded(stored("default"))))
    assert before == config.build(composed(HALF).bucketing)
    assert [b.name for b in before.buckets] == ["64x256", "96x160", "128x128", "160x96", "256x64"]
    assert {*before.buckets} < {*now.buckets}


def test_once_continued_it_is_still_the_same_run(outputs: Path) -> None:
    """This version writes config.yaml and arm.json anew; the directory's name stays."""
    folder = outputs / RUNS["default"][1]
    cfg = config.compose([f"output_dir={outputs}"])
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "arm.json").write_text(
        json.dumps({"sweep": None, "arm": {}, "seed": 0, "signature": config.signature(cfg)})
    )
    assert place(outputs) == folder


def test_a_run_of_this_version_goes_before(outputs: Path) -> None:
    new = outputs / f"tiny-ztsnr-v-minsnr-{config.signature(composed())}"
    new.mkdir()
    assert place(outputs) == new


def test_where_the_rate_depends_on_the_length_a_longer_run_is_another(outputs: Path) -> None:
    file = outputs / RUNS["default"][1] / "config.yaml"
    text = file.read_text()
    assert "nai_xl.engine.optimizer.constant" in text
    file.write_text(text.replace("nai_xl.engine.optimizer.constant", "nai_xl.engine.optimizer.linear"))
    assert place(outputs, "lr=linear", HALF) == file.parent
    assert place(outputs, "lr=linear", HALF, "run.max_images=20000") != file.parent
    assert place(outputs, HALF) != file.parent


def test_only_what_0_1_made_is_parsed_and_once(outputs: Path) -> None:
    later = outputs / "tiny-ztsnr-v-minsnr-00000000"
    later.mkdir()
    (later / "config.yaml").write_text("run: {seed: 0}\nthis: is: no yaml")
    (later / "arm.json").write_text("torn")
    (outputs / "tiny-ztsnr-v-minsnr-11111111").touch()
    (outputs / "tiny-ztsnr-v-minsnr-of-another-name").mkdir()
    identity._of_stored.cache_clear()
    for seed in (1, 2, 3):
        assert not place(outputs, f"run.seed={seed}").exists()
    assert identity._of_stored.cache_info().misses == 2  # of the three, the two with this name


def test_a_damaged_config_of_0_1_is_passed_over_and_told_to_who_asks_for_it(outputs: Path) -> None:
    folder = outputs / RUNS["default"][1]
    with (folder / "config.yaml").open("a") as file:
        file.write("this: is: no yaml\n")
    assert place(outputs) != folder
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        config.stored_config(folder)
    (folder / "config.yaml").write_text("- a\n- list\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        config.stored_config(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError):
        config.stored_config(folder)


def test_noted_choices_name_the_options_that_0_1_had_no_groups_for() -> None:
    noted = {"loss": "minsnr", "run.mixed_precision": "no", "run.seed": 0}
    found = config.upgraded_choices(noted)
    assert found["precision"] == "fp32" and found["precision.autocast"] == "no" and found["loss"] == "minsnr"
    assert (found["adapter"], found["task"]) == ("full", "text_to_image")
    assert "run.mixed_precision" not in found
    assert config.upgraded_choices({"precision": "bf16", "adapter": "lora"})["adapter"] == "lora"
    assert config.upgraded_choices({}) == {}
