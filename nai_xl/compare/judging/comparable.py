"""What can be compared between arms that differ in some settings: which metrics keep their meaning, and whether a place
in the run has the same image in all arms. The evaluators and the meter declare the former.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omegaconf import DictConfig

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.judging.verdicts import Scopes, declared_by, declared_scopes, longest
from nai_xl.compare.runs.naming import NOT_OF_THE_METHOD, different_keys

# what data.epoch_plan is a function of: which image stands at which position of a run
OF_THE_PLAN = ("bucketing", "data", "native.resolution", "native.bucket_step", "run.batch_size", "run.chunk")


def settings(arms: Sequence[ArmRuns]) -> dict[str, list[object]]:
    """config key -> its value in each arm that has a run, for the keys of the method that they differ in."""
    firsts = [arm.first for arm in arms if arm.first is not None]
    configs = [run.config for run in firsts]
    keys = [key for key in different_keys(configs) if not key.startswith(NOT_OF_THE_METHOD)]
    keys = [key for key in keys if [config.get(key) for config in configs] != [run.seed for run in firsts]]
    return {key: [config.get(key) for config in configs] for key in keys}


def varied(arms: Sequence[ArmRuns]) -> list[str]:
    """The keys that the arms are named by, and the settings that they differ in."""
    return list(dict.fromkeys([*different_keys([arm.choices for arm in arms]), *settings(arms)]))


def hindrances(metric: str, keys: Iterable[str], scopes: Scopes | None = None) -> list[str]:
    """Those declared settings, among the varied `keys`, over which the metric keeps no meaning."""
    return among(keys, longest(metric, declared_scopes(()) if scopes is None else scopes) or ())


def among(keys: Iterable[str], groups: Iterable[str]) -> list[str]:
    """Those of `groups` that one of `keys` is or belongs to: data for data.held_out."""
    keys = list(keys)
    return [group for group in groups if any(key == group or key.startswith(f"{group}.") for key in keys)]


def plan_note(keys: Iterable[str]) -> list[str]:
    """The remark on arms that do not see the same images; none if they do."""
    if not (found := among(keys, OF_THE_PLAN)):
        return []
    return [
        f"the arms differ in {', '.join(found)}, so with one seed they may take their images in different orders: a "
        "place in the run has the same timestep draw in all arms, but seldom the same image and noise. Verdicts hold; "
        "pairing by seed gives little"
    ]


def leading(cfg: DictConfig, keys: Sequence[str]) -> list[str]:
    """The metrics to show first of a sweep over `keys` that names none: those that the config's evaluators declare by
    their whole names, then the training loss; without those that keep no meaning over `keys`.
    """
    scopes = declared_scopes([cfg])
    names = [name for name in (*declared_by(cfg, "better"), "train/loss") if not name.endswith("/")]
    return [name for name in names if not hindrances(name, keys, scopes)]
