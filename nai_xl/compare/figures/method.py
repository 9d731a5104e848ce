"""The arms' methods overlaid: their noise levels and how much each timestep counts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.canvas import Drawn
from nai_xl.diffusion.diagnosis import Diagnosis, diagnose
from nai_xl.errors import UserError
from nai_xl.evals import method_figure
from nai_xl.inspect.combinations import build_objective


def method(found: Comparison, configs: Mapping[str, DictConfig]) -> Drawn | None:
    """The figure of the arms whose `configs` (run name -> config) are here; None if their methods do not differ."""
    tables: dict[str, Diagnosis] = {}
    for arm in found.arms:
        run = arm.first
        if run is None or not configs.get(run.name):
            continue
        cfg = configs[run.name]
        parts = [key for key in cfg if key in config.groups() or key in ("plugins", "native", "objective")]
        try:
            tables[found.names[arm.label]] = diagnose(build_objective(OmegaConf.masked_copy(cfg, parts)))
        except UserError:
            continue  # an arm that was refused, or a plug-in that is not installed here
    if all(_alike(one, other) for one, other in pairwise(tables.values())):
        return None
    variants = [method_figure.Variant(table, name) for name, table in tables.items()]
    image = method_figure.method(variants, "", method_figure.Legend("arm"))
    png = io.BytesIO()
    image.save(png, format="PNG")
    return Drawn(png.getvalue())


def _alike(one: Diagnosis, other: Diagnosis) -> bool:
    return len(one) == len(other) and all(
        bool((getattr(one, name) == getattr(other, name)).all()) for name in ("noise", "weight", "density")
    )
