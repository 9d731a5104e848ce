"""Reading configs and headers, with one clear error for what is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nai_xl.errors import UserError


def refusal(path: Path, what: str, option: str = "model.path") -> UserError:
    """The error to raise about `path`, which config key `option` names."""
    return UserError(f"{option}={path}: {what}")


def read_json(path: Path, root: Path, option: str) -> dict[str, Any]:
    """A JSON object; UserError if the file is missing or is not one."""
    name = path.relative_to(root)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise refusal(root, f"{name} is missing; this is not a complete SDXL model folder", option) from error
    except ValueError as error:
        raise refusal(root, f"{name} is not valid JSON ({error})", option) from error
    if not isinstance(content, dict):
        raise refusal(root, f"{name} is not a JSON object", option)
    return content


def open_header(file: Path, root: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the file, from its header; UserError if it is truncated or corrupt."""
    name = "" if file == root else f"{file.relative_to(root)} "
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise refusal(root, f"{name}is corrupt or not completely downloaded ({error})") from error
    except OSError as error:
        raise refusal(root, f"{name}cannot be read ({error})") from error
