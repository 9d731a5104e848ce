"""Small stand-ins for libraries around other trainers' loops, for a machine that lacks them; installed ones win.

What they do for the flags of peers_arms.py, and no more: reading images and captions, cropping nothing, reading TOML,
checking types. The loops, networks, optimizers and schedulers stay the trainers' own.
"""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

Columns = dict[str, list[Any]]

# --- datasets ---------------------------------------------------------------------------------------------------------


class Dataset:
    """Columns in memory, and what is made of some rows when they are read."""

    def __init__(self, columns: Columns, transform: Callable[[Columns], Columns] = lambda rows: rows):
        self.columns, self.transform = columns, transform

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {name: values[0] for name, values in self._rows(range(place, place + 1)).items()}

    def with_transform(self, transform: Callable[[Columns], Columns]) -> Dataset:
        return Dataset(self.columns, transform)

    def remove_columns(self, names: Sequence[str]) -> Dataset:
        return Dataset({name: values for name, values in self.columns.items() if name not in names}, self.transform)

    def map(self, make: Callable[[Columns], Mapping[str, Any]], batch_size: int = 1000, **ignored: Any) -> Dataset:
        made: Columns = {}
        for start in range(0, len(self), batch_size):
            for name, values in make(self._rows(range(start, min(start + batch_size, len(self))))).items():
                made.setdefault(name, []).extend(np.asarray(value) for value in values)
        return Dataset(self.columns | made, self.transform)

    def _rows(self, places: Iterable[int]) -> Columns:
        wanted = list(places)
        return self.transform({name: [values[n] for n in wanted] for name, values in self.columns.items()})


def load_dataset(kind: str, *, data_files: Mapping[str, str], **ignored: Any) -> dict[str, Dataset]:
    """The folder's metadata.jsonl with its images."""
    folder = Path(data_files["train"]).parent
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    return {"train": Dataset({"image": pictures, "text": [row["text"] for row in rows]})}


def concatenate_datasets(some: Sequence[Dataset], axis: int) -> Dataset:
    return Dataset({name: values for one in some for name, values in one.columns.items()})


class Hasher:
    @staticmethod
    def hash(value: Any) -> str:
        return str(value)


# --- torchvision ------------------------------------------------------------------------------------------------------


class InterpolationMode(Enum):
    BILINEAR, BICUBIC, LANCZOS = range(3)


class Unchanged:
    """A resize or crop of pictures that have their size already; it refuses any other."""

    def __init__(self, size: int, **ignored: Any):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        assert image.size == (self.size, self.size), image.size
        return image

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        assert image.size == size[::-1], image.size
        return 0, 0, *size


class Flip:
    def __init__(self, p: float):
        pass


class Compose:
    def __init__(self, steps: Sequence[Callable[[Any], Any]]):
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


class ToTensor:
    def __call__(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


# --- sd-scripts' small libraries --------------------------------------------------------------------------------------


def image_size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def load_toml(source: Any) -> dict[str, Any]:
    return tomllib.loads(Path(source).read_text(encoding="utf-8"))


def rearrange(x: torch.Tensor, pattern: str, h: int = 0) -> torch.Tensor:
    match pattern:
        case "b n (h d) -> b h n d":
            return x.unflatten(-1, (h, -1)).transpose(1, 2)
        case "b n (h d) -> b n h d":
            return x.unflatten(-1, (h, -1))
        case "b h n d -> b n (h d)":
            return x.transpose(1, 2).flatten(2)
        case "b n h d -> b n (h d)":
            return x.flatten(2)
    raise NotImplementedError(pattern)


class MultipleInvalid(Exception):
    pass


class Schema:
    def __init__(self, schema: Any, extra: Any = None):
        self.schema = schema

    def __call__(self, value: Any) -> Any:
        return _valid(self.schema, value)


def _valid(schema: Any, value: Any) -> Any:
    if isinstance(schema, dict):
        named = {str(key): inner for key, inner in schema.items()}
        return {key: _valid(named[key], inner) for key, inner in value.items()}
    if isinstance(schema, list):
        return [_valid(schema[0], inner) for inner in value]
    if isinstance(schema, type):
        if not isinstance(value, schema):
            raise MultipleInvalid(f"{value!r} is no {schema.__name__}")
        return value
    return schema(value) if callable(schema) else value


def either(*schemas: Any) -> Callable[[Any], Any]:
    def valid(value: Any) -> Any:
        for schema in schemas:
            try:
                return _valid(schema, value)
            except MultipleInvalid:
                continue
        raise MultipleInvalid(value)

    return valid


def anything(schema: Any) -> Callable[[Any], Any]:
    return lambda value: value


def sequence(schemas: Sequence[Any]) -> Callable[[Any], Any]:
    return lambda values: [_valid(schema, value) for schema, value in zip(schemas, values, strict=True)]


# --- modules ----------------------------------------------------------------------------------------------------------

MODULES: Mapping[str, Mapping[str, Any]] = {
    "datasets": {"load_dataset": load_dataset, "concatenate_datasets": concatenate_datasets},
    "datasets.fingerprint": {"Hasher": Hasher},
    "datasets.utils": {},
    "datasets.utils.logging": {
        name: lambda: None for name in ("set_verbosity_warning", "set_verbosity_error")
    },
    "torchvision": {},
    "torchvision.transforms": {
        "InterpolationMode": InterpolationMode, "Resize": Unchanged, "CenterCrop": Unchanged, "RandomCrop": Unchanged,
        "RandomHorizontalFlip": Flip, "Compose": Compose, "ToTensor": ToTensor, "Normalize": Normalize,
    },
    "torchvision.transforms.functional": {"crop": crop},
    "imagesize": {"get": image_size},
    "cv2": {},
    "toml": {"load": load_toml, "TomlDecodeError": tomllib.TOMLDecodeError},
    "einops": {"rearrange": rearrange},
    "voluptuous": {
        "Any": either, "ExactSequence": sequence, "MultipleInvalid": MultipleInvalid, "Invalid": MultipleInvalid,
        "Object": anything, "Required": str, "Schema": Schema, "ALLOW_EXTRA": None,
    },
}  # fmt: skip


def stand_in() -> list[str]:
    """Put a stand-in in the place of each library that is not installed; their names."""
    # these look for torchvision when they are imported, and must not find a stand-in
    for library, name in (("diffusers", "StableDiffusionXLPipeline"), ("transformers", "CLIPTextModelWithProjection")):
        getattr(importlib.import_module(library), name)
    missing = [name for name in MODULES if "." not in name and find_spec(name) is None]
    for name, members in MODULES.items():
        top, _, end = name.rpartition(".")
        if name.split(".")[0] in missing:
            module = sys.modules[name] = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            vars(module).update(members, __path__=[])
            if top:
                setattr(sys.modules[top], end, module)
    return missing
