"""python -m nai_xl.sample RUN "a prompt" [...]: paint prompts with a finished run, exactly as it was trained.

Settings that are not given are those of the run's own sample grids. Every PNG carries its prompt, seed and settings.
The same settings paint the same picture. A run with plug-ins needs them named again: 'plugins=[mine]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from nai_xl.config.trust import is_plugins
from nai_xl.diffusion.sampling import SOLVERS
from nai_xl.errors import UserError
from nai_xl.model.quiet import quiet_libraries
from nai_xl.sample.paint import paint


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `arguments`."""
    parser = argparse.ArgumentParser(prog="nai_xl.sample", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run directory with a pipeline/")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; the model's native square if left out")
    parser.add_argument("--steps", type=int, help="the run's own if left out, as the next three")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
    parser.add_argument("--method", choices=SOLVERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, from seed, seed + 1, ...")
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument("--out", type=Path, help="RUN/painted if left out")
    words = sys.argv[1:] if arguments is None else arguments
    return parser.parse_args([word for word in words if not is_plugins(word)])  # config.stored_config reads those


def main() -> None:
    asked = parse()
    quiet_libraries()
    try:
        for path in paint(asked):
            print(path)
    except (UserError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
