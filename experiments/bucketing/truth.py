"""What the training pictures of experiment=bucketing show after cropping: python experiments/bucketing/truth.py"""

import numpy as np
from PIL import Image

from nai_xl.data.bucketing import AspectBuckets, SquareBucket
from nai_xl.data.images import on_canvas
from nai_xl.data.source.drawing import Vocabulary, contrast, picture
from nai_xl.evals.bodies import find_bodies

WORDS = Vocabulary(colors=("white",), shapes=("circle",), backgrounds=("black",))

for name, bucketing in (("aspect", AspectBuckets(64, 16)), ("square", SquareBucket(64))):
    cut, errors = [], []
    for number in range(400):
        shown = picture(0, number, include=["shapes"], resolution=64, words=WORDS)
        image = Image.fromarray(shown.rgb())
        pixels = np.asarray(on_canvas(image, bucketing.placements(*image.size)[0]))
        found = find_bodies(pixels, contrast("white", "black") / 2)
        cut.append(found.cut / max(1, found.count))
        errors.append(abs(found.count - shown.scene.number))
    print(f"{name}: cut {np.mean(cut):.3f}, pictures with a cut body {np.mean(np.array(cut) > 0):.3f}, "
          f"count_error {np.mean(errors):.3f}")  # fmt: skip
