"""evals=coherence: are there as many bodies as prompted, and are they whole?

For models trained on data=shapes. If the strongest noise leaves low frequencies visible, a model paints the parts of a
larger canvas than it was trained on without regard to each other (NovelAI V3, 2409.15997, section 2.3). A model trained
on square crops has seen cut bodies, and paints cut bodies (ibid., on aspect-ratio bucketing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nai_xl.data.source.drawing import EVERYTHING, Colors, Numbers, Scene, Shapes, Vocabulary, contrast, draw_scene
from nai_xl.evals.bodies import find_bodies
from nai_xl.evals.prompted import PromptedEvaluator
from nai_xl.interfaces import Direction
from nai_xl.rng import draws

SEED = 0  # of the prompts: the same for every run


@dataclass(frozen=True)
class Coherence(PromptedEvaluator):
    """Prompts of `count` scenes of data=shapes, divided evenly between the numbers of bodies.

    `bodies`, `colors`, `shapes` and `backgrounds` are what prompts name: take what the training pictures show.

    coherence/count_error is the mean of |found - prompted|, coherence/right the share of samples with the prompted
    number, coherence/too_many of those with more, coherence/cut the share of a sample's bodies that touch the border.
    coherence/empty is the share of samples without any body. Such a sample is a failure by every measure: it counts as
    1 in cut and too_many, so that an arm that paints nothing does not win by them.
    """

    better: ClassVar[Mapping[str, Direction]] = {
        "coherence/count_error": "lower",
        "coherence/cut": "lower",
        "coherence/empty": "lower",
        "coherence/right": "higher",
        "coherence/too_many": "lower",
    }
    equal_within: ClassVar[Mapping[str, str]] = {"coherence/": "0.05"}

    count: Annotated[int, Field(ge=1)] = 8
    bodies: Numbers = EVERYTHING.bodies
    colors: Colors = EVERYTHING.colors
    shapes: Shapes = EVERYTHING.shapes
    backgrounds: Colors = EVERYTHING.backgrounds

    @cached_property
    def scenes(self) -> Mapping[str, Scene]:
        """Name -> scene; the name begins with the number of bodies."""
        words = Vocabulary(self.bodies, self.colors, self.shapes, self.backgrounds)
        drawn = (draw_scene(draws(SEED, place), ["shapes"], words) for place in range(100 * self.count))
        numbers = sorted(set(self.bodies))
        each, rest = divmod(self.count, len(numbers))
        wanted = {number: each + (place < rest) for place, number in enumerate(numbers)}
        chosen = []
        for scene in drawn:
            if wanted[scene.number]:
                wanted[scene.number] -= 1
                chosen.append(scene)
        return {f"{scene.number}-{place:03d}": scene for place, scene in enumerate(chosen)}

    def prompts(self) -> Mapping[str, str]:
        return {name: scene.caption for name, scene in self.scenes.items()}

    def measure(self, name: str, pixels: NDArray[np.uint8]) -> Mapping[str, float]:
        scene = self.scenes[name]
        # half way from the background to the bodies, as they were prompted
        found = find_bodies(pixels, contrast(scene.colour, scene.background) / 2)
        return {
            "coherence/count_error": abs(found.count - scene.number),
            "coherence/right": found.count == scene.number,
            "coherence/too_many": not found.count or found.count > scene.number,
            "coherence/cut": found.cut / found.count if found.count else 1,
            "coherence/empty": not found.count,
        }
