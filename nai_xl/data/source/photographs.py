"""The sample data set `data=sample`: small captioned pictures cut out of the photographs in the scikit-image wheel.

Nothing is downloaded and nothing is shipped: the pictures are read out of the installed wheel and cut by the table
below. Where each photograph comes from, and under which licence, is told in docs/sample_licences.md.
"""

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nai_xl.errors import UserError

MAX_SIDE = 512
JPG_QUALITY = 95
MARKER = ".nai_xl_sample"


class Crop(NamedTuple):
    """One picture of the set: a box (left, top, right, bottom, in pixels) of a photograph in the wheel."""

    stem: str
    source: str
    box: tuple[int, int, int, int]
    caption: str

    @property
    def file_name(self) -> str:
        """The crop keeps its source's format: lossless stays lossless."""
        return self.stem + Path(self.source).suffix


class Card(NamedTuple):
    """One picture of a single colour."""

    stem: str
    size: tuple[int, int]
    colour: tuple[int, int, int]
    caption: str

    @property
    def file_name(self) -> str:
        """Always PNG, so that each pixel has exactly the colour."""
        return self.stem + ".png"


# Boxes are 1:1, 5:3 or 3:5, at least as large as the buckets 128x128, 160x96 and 96x160.
SQUARE_CROPS = (
    Crop("astronaut", "astronaut.png", (0, 0, 512, 512), "portrait of an astronaut in an orange space suit"),
    Crop("woman", "astronaut.png", (150, 8, 310, 168), "the face of a smiling woman with short hair"),
    Crop("badge", "astronaut.png", (106, 320, 234, 448), "a round purple badge sewn on orange cloth"),
    Crop("cat", "chelsea.png", (75, 0, 375, 300), "the face of a tabby cat"),
    Crop("cat_eye", "chelsea.png", (107, 51, 235, 179), "close up of one green eye"),
    Crop("coffee", "coffee.png", (77, 0, 477, 400), "a red cup of coffee on a saucer, from above"),
    Crop("espresso", "coffee.png", (170, 5, 410, 245), "brown espresso with foam in a white cup"),
    Crop("retina", "retina.jpg", (0, 0, 1411, 1411), "photo of a human retina, a big orange disc"),
    Crop("optic_nerve", "retina.jpg", (56, 430, 480, 854), "a yellow circle crossed by red blood vessels"),
    Crop("deep_field", "hubble_deep_field.jpg", (64, 0, 936, 872), "hundreds of tiny galaxies in black space"),
    Crop("cameraman", "camera.png", (0, 0, 512, 512), "a man in a long dark coat looking through a camera"),
    Crop("gravel", "gravel.png", (100, 100, 300, 300), "many small grey stones"),
    Crop("gland", "ihc.png", (216, 302, 421, 507), "a brown oval with a star pattern on pale tissue"),
    Crop("horse", "horse.png", (0, -36, 400, 364), "black silhouette of a standing horse"),
)
LANDSCAPE_CROPS = (
    Crop("helmet", "astronaut.png", (272, 338, 512, 482), "a shiny black helmet"),
    Crop("cat_eyes", "chelsea.png", (110, 65, 370, 221), "two open eyes of a cat"),
    Crop("whiskers", "chelsea.png", (110, 154, 350, 298), "pink nose and long whiskers"),
    Crop("spoon", "coffee.png", (300, 215, 500, 335), "a silver spoon on a red plate"),
    Crop("towers", "rocket.jpg", (0, 43, 640, 427), "a rocket between four towers at dusk"),
    Crop("lamps", "rocket.jpg", (70, 313, 260, 427), "bright lamps with long rays"),
    Crop("galaxies", "hubble_deep_field.jpg", (220, 20, 520, 200), "large blue and orange galaxies"),
    Crop("fovea", "retina.jpg", (406, 520, 1006, 880), "a dark red spot on orange"),
    Crop("coins", "coins.png", (0, 0, 384, 230), "rows of old metal coins"),
    Crop("handwriting", "text.png", (0, 0, 286, 172), "handwritten letters on lined paper"),
    Crop("clock", "clock_motion.png", (0, 30, 400, 270), "a blurred clock on a plain grey wall"),
    Crop("city", "camera.png", (322, 110, 512, 224), "a distant city under a pale sky"),
)
PORTRAIT_CROPS = (
    Crop("shuttle", "astronaut.png", (333, 0, 501, 280), "a space shuttle with a brown tank"),
    Crop("flag", "astronaut.png", (0, 0, 99, 165), "an american flag with stars and stripes"),
    Crop("rocket", "rocket.jpg", (232, 127, 412, 427), "a tall white rocket at night"),
    Crop("tower", "rocket.jpg", (0, 40, 150, 290), "a steel tower against a blue sky"),
    Crop("wood", "coffee.png", (480, 40, 600, 240), "polished wood of a table"),
    Crop("bright_star", "hubble_deep_field.jpg", (680, 410, 806, 620), "a bright star below a golden galaxy"),
    Crop("retina_edge", "retina.jpg", (1051, 400, 1411, 1000), "the curved edge of an orange ball"),
    Crop("blue_cells", "ihc.png", (416, 310, 512, 470), "pale tissue with scattered blue cells"),
    Crop("tripod", "camera.png", (232, 237, 397, 512), "a metal tripod on a lawn"),
    Crop("horse_head", "horse.png", (240, 0, 399, 265), "the head of a horse"),
    Crop("bricks", "brick.png", (100, 0, 407, 512), "a floor of long grey bricks"),
)
CROPS = SQUARE_CROPS + LANDSCAPE_CROPS + PORTRAIT_CROPS

SQUARE, LANDSCAPE, PORTRAIT = (256, 256), (320, 192), (192, 320)
CARDS = (
    Card("card_black", SQUARE, (0, 0, 0), "a completely black image"),
    Card("card_white", SQUARE, (255, 255, 255), "a completely white image"),
    Card("card_red", LANDSCAPE, (220, 20, 20), "a completely red image"),
    Card("card_blue", LANDSCAPE, (20, 40, 220), "a completely blue image"),
    Card("card_grey", LANDSCAPE, (128, 128, 128), "a completely grey image"),
    Card("card_purple", LANDSCAPE, (120, 20, 160), "a completely purple image"),
    Card("card_green", PORTRAIT, (20, 160, 40), "a completely green image"),
    Card("card_yellow", PORTRAIT, (250, 230, 20), "a completely yellow image"),
    Card("card_orange", PORTRAIT, (250, 130, 10), "a completely orange image"),
    Card("card_pink", PORTRAIT, (255, 150, 190), "a completely pink image"),
)
RECIPE: tuple[Crop | Card, ...] = CROPS + CARDS


def write_sample(folder: Path) -> Path:
    """Write the sample data set (PNG or high-quality JPG images, each with a same-name .txt caption) into `folder`,
    once; return `folder`."""
    target = folder.resolve()  # a link stays a link: the folder it points to is the one replaced
    try:
        if not _is_complete(target):
            _write_and_swap(target, _open_sources(_wheel_data()))
    except OSError as error:
        raise UserError(
            f"Cannot write the sample data set into {folder} ({error.strerror or error}). "
            "Choose another place with data.cache=DIR or the environment variable NAI_XL_CACHE."
        ) from error
    return folder


def _version() -> str:
    """Changes whenever the recipe does, so that an older set is written anew."""
    return hashlib.sha256(repr((RECIPE, MAX_SIDE, JPG_QUALITY)).encode()).hexdigest()[:16]


def _file_names() -> list[str]:
    """Every file of the set but the marker."""
    return [name for item in RECIPE for name in (item.file_name, item.stem + ".txt")]


def _is_complete(folder: Path) -> bool:
    """True when the marker is of this recipe and no file has been removed since."""
    if _marker_lines(folder)[:1] != [_version()]:
        return False
    return {path.name for path in folder.iterdir()}.issuperset(_file_names())


def _marker_lines(folder: Path) -> list[str]:
    """The version and the file names of the set in `folder`; nothing if there is none."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _wheel_data() -> Path:
    """The folder of the photographs inside the scikit-image wheel."""
    try:
        import skimage  # only here: the package is optional and slow to import
    except ImportError as error:
        raise UserError("data=sample needs scikit-image: run pip install 'nai_xl[demo]'.") from error
    return Path(skimage.__file__).parent / "data"


def _open_sources(data: Path) -> dict[str, Image.Image]:
    """Every photograph of the recipe by file name."""
    images = {}
    for name in sorted({item.source for item in RECIPE if isinstance(item, Crop)}):
        try:
            with Image.open(data / name) as image:
                images[name] = image.copy()
        except OSError as error:
            raise UserError(
                f"data=sample cannot read {data / name} of scikit-image: "
                "run pip install --force-reinstall 'nai_xl[demo]'."
            ) from error
    return images


def _write_and_swap(target: Path, sources: dict[str, Image.Image]) -> None:
    """Write everything beside `target`, then rename, so that a half-written set is never found under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()  # a folder in the scratch folder, since the latter is closed to other users
        _write_files(fresh, sources)
        if _is_complete(target):  # another process was quicker
            return
        with suppress(FileNotFoundError):  # the usual case: there is no older set
            target.rename(Path(scratch) / "stale")  # deleted with the scratch folder
        try:
            fresh.rename(target)
        except OSError:
            if not _is_complete(target):  # otherwise another process was quicker still
                raise


def _refuse_foreign_files(target: Path) -> None:
    """Replacing the folder deletes what is in it: that must be nothing but an older or broken sample set."""
    if not target.exists():
        return
    ours = {MARKER, *_file_names(), *_marker_lines(target)}
    foreign = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if foreign:
        raise UserError(
            f"Cannot write the sample data set into {target}: it holds other files ({foreign[0]}). Remove them, or "
            "choose another place with data.cache=DIR or the environment variable NAI_XL_CACHE."
        )


def _write_files(folder: Path, sources: dict[str, Image.Image]) -> None:
    """Images and captions, and last of all the marker."""
    for item in RECIPE:
        image = _cut(sources[item.source], item) if isinstance(item, Crop) else _fill(item)
        image.save(folder / item.file_name, quality=JPG_QUALITY)  # PNG pays no heed to quality
        (folder / f"{item.stem}.txt").write_text(item.caption + "\n", encoding="utf-8")
    (folder / MARKER).write_text("\n".join([_version(), *_file_names(), ""]), encoding="utf-8")


def _cut(source: Image.Image, crop: Crop) -> Image.Image:
    """The crop as RGB, its longer side at most MAX_SIDE pixels."""
    image = source.crop(crop.box)
    if image.mode == "RGBA":  # the horse: clear where there is no horse, and beyond the picture's rim
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def _fill(card: Card) -> Image.Image:
    """A picture of the card's colour."""
    return Image.new("RGB", card.size, card.colour)
