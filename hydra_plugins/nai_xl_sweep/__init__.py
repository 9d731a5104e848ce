"""What Hydra has to find by itself: the launcher hydra/launcher=arms, and the callback that names what a sweep varies.

Hydra imports this in every program, so it imports nothing but Hydra; the work is done in nai_xl.sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


@dataclass
class ArmsLauncherConf:
    _target_: str = "hydra_plugins.nai_xl_sweep.ArmsLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="arms", node=ArmsLauncherConf, provider="nai_xl")


class ArmReturn(JobReturn):
    """A job's return value, or its error, raised in silence: the sweep's table has told it."""

    @property
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
        loader = self.hydra_context.config_loader
        configs = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        returns: list[JobReturn] = []
        for overrides, value in zip(job_overrides, sweep.launch(self.config, configs), strict=True):
            status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
            returns.append(ArmReturn(overrides=overrides, status=status, _return_value=value))
        return returns


class NameSweep(Callback):
    """Gives every job of a sweep two overrides, whatever the launcher: the sweep's name and the keys that it varies."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = config.hydra.overrides.task
        keys = varied(OmegaConf.select(config, "hydra.sweeper.params") or {}, overrides)
        choices = config.hydra.runtime.choices
        name = config.sweep.name or choices.get("experiment") or "-".join(key for key in keys if key != "run.seed")
        with read_write(config), open_dict(config):
            overrides += [f"sweep.name={name or 'seeds'}", f"sweep.varied=[{','.join(keys)}]"]


def varied(params: Any, overrides: Sequence[str]) -> list[str]:
    """The keys given several values, by an experiment or on the command line, which goes before."""
    given = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = OverridesParser.create().parse_overrides(given)
    swept = {str(override.get_key_element()).lstrip("+"): override.is_sweep_override() for override in parsed}
    return [key for key, several in swept.items() if several]
