"""What Hydra has to find by itself: the launcher hydra/launcher=arms, the sweeper hydra/sweeper=arms for arms that are
listed one by one, and the callback that names what a sweep varies.

Hydra imports this in every program, so it imports nothing but Hydra; the work is done in nai_xl.sweep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


@dataclass
class ArmsLauncherConf:
    _target_: str = "hydra_plugins.nai_xl_sweep.ArmsLauncher"


@dataclass
class ArmsSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.nai_xl_sweep.ArmsSweeper"


for group, node in (("launcher", ArmsLauncherConf), ("sweeper", ArmsSweeperConf)):
    ConfigStore.instance().store(group=f"hydra/{group}", name="arms", node=node, provider="nai_xl")


class ArmReturn(JobReturn):
    """A job's return value, or its error, raised in silence: the sweep's table has told it."""

    @property  # type: ignore[misc]  # Hydra's has a setter too, and nothing sets it
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value


class ArmsLauncher(BasicLauncher):
    """Each arm in a process of its own, for programs that say how; those that do not run in this one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sweep = getattr(self.task_function, "sweep", None)
        if sweep is None:
            return super().launch(job_overrides, initial_job_idx)
        assert self.config is not None and self.hydra_context is not None
        master, loader = self.config, self.hydra_context.config_loader

        def compose(overrides: Sequence[str]) -> DictConfig:
            return loader.load_sweep_config(master, list(overrides))

        values = sweep.launch(master, [compose(overrides) for overrides in job_overrides], compose)
        returns: list[JobReturn] = []
        for overrides, value in zip(job_overrides, values, strict=True):
            status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
            returns.append(ArmReturn(overrides=overrides, status=status, _return_value=value))
        return returns


class ArmsSweeper(BasicSweeper):
    """Hydra's own sweeper. Where sweep.arms lists arms one by one, each of them with every combination of the rest.

    Each arm has its config in its run directory; that of the sweep is not written, since it can hold a password.
    """

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        self.overrides = self.split_arguments(overrides, self.max_batch_size)
        returns: list[Sequence[JobReturn]] = []
        begun = 0
        while not self.is_done():
            batch = self.get_job_batch()
            self.validate_batch_is_legal(batch)
            results = self.launcher.launch(batch, initial_job_idx=begun)
            for result in results:
                _ = result.return_value  # raises what the job has raised
            begun += len(batch)
            returns.append(results)
        return returns

    def split_arguments(  # type: ignore[override]  # static in Hydra, which calls it on the object
        self, overrides: Sequence[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.config is not None
        refuse_rounds(self.config)
        arms = listed(OmegaConf.select(self.config, "sweep.arms") or [], overrides)
        rest = [override for override in overrides if not any(_key(override) in arm for arm in arms)]
        (points,) = BasicSweeper.split_arguments(rest, None)
        jobs = [[*as_overrides(arm), *point] for arm in arms or [{}] for point in points]
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))


def refuse_rounds(config: DictConfig) -> None:
    """Raises HydraException where a sweep is to look at its arms and the launcher cannot."""
    asked = [key for key in ("seeds_until", "prune") if OmegaConf.select(config, f"sweep.{key}")]
    if asked and config.hydra.launcher._target_ != ArmsLauncherConf._target_:
        raise HydraException(f"sweep.{asked[0]} is for hydra/launcher=arms; leave one of them out")


def listed(arms: Sequence[Mapping[str, Any]], overrides: Sequence[Override]) -> list[dict[str, str]]:
    """The arms of sweep.arms, key -> value as one types it. A value among the overrides picks the arms that have it.

    Raises HydraException where it picks none.
    """
    found = [{str(key): _typed(value) for key, value in arm.items()} for arm in arms]
    for override in overrides:
        key = _key(override)
        if any(key in arm for arm in found):
            several = override.is_discrete_sweep()
            wanted = [*override.sweep_string_iterator()] if several else [override.get_value_element_as_str()]
            known = ", ".join(dict.fromkeys(arm[key] for arm in found if key in arm))
            found = [arm for arm in found if key in arm and _read(arm[key]) in map(_read, wanted)]
            if not found:
                raise HydraException(f"{key}={','.join(wanted)}: no arm of sweep.arms has that; there is {known}")
    return found


def as_overrides(arm: Mapping[str, str]) -> list[str]:
    """The overrides that make this arm."""
    return [f"{key}={value}" for key, value in arm.items()]


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _typed(value: Any) -> str:
    """A value of a yaml as an override on the command line has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_typed(part)}' for key, part in value.items())}}}"
    if isinstance(value, str):
        return value if _plain(value) else QuotedString(value, Quote.single).with_quotes()
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, Sequence) else str(value)


def _read(typed: str) -> Any:
    """The value that Hydra reads where one types this: 'a' and a are the same."""
    return OverridesParser.create().parse_override(f"key={typed}").value()


def _plain(text: str) -> bool:
    """Whether Hydra reads this text as itself without quotes, also within a list."""
    try:
        return bool(_read(f"[{text}]") == [text])
    except HydraException:
        return False


class NameSweep(Callback):
    """Gives every job of a sweep these overrides, whatever the launcher: the sweep's name, the keys that it varies, and
    the number of seeds if it has several.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = config.hydra.overrides.task
        keys = varied(OmegaConf.select(config, "hydra.sweeper.params") or {}, overrides, config.sweep.arms)
        choices = config.hydra.runtime.choices
        name = config.sweep.name or choices.get("experiment") or "-".join(key for key in keys if key != "run.seed")
        if config.sweep.seeds_until and "run.seed" not in keys:
            keys.append("run.seed")
        seeds = number_of_seeds(OmegaConf.select(config, "hydra.sweeper.params") or {}, overrides)
        with read_write(config), open_dict(config):
            overrides += [f"sweep.name={name or 'seeds'}", f"sweep.varied=[{','.join(keys)}]"]
            overrides += [f"sweep.seeds={seeds}"] if seeds > 1 else []


def number_of_seeds(params: Any, overrides: Sequence[str]) -> int:
    """How many seeds are listed, by an experiment or on the command line; 1 where none are."""
    given = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = [one for one in OverridesParser.create().parse_overrides(given) if _key(one) == "run.seed"]
    return len([*parsed[-1].sweep_string_iterator()]) if parsed and parsed[-1].is_discrete_sweep() else 1


def varied(params: Any, overrides: Sequence[str], arms: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """The keys given several values: by listed arms, by an experiment, or on the command line, which goes before."""
    given = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = OverridesParser.create().parse_overrides(given)
    swept = {_key(override): override.is_sweep_override() for override in parsed}
    of_arms = dict.fromkeys(str(key) for arm in arms for key in arm)
    return [*of_arms, *(key for key, several in swept.items() if several and key not in of_arms)]
