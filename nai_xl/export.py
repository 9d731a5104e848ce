"""python -m nai_xl.export RUN FILE.safetensors: a run's pipeline as one file in SDXL's original layout.

ComfyUI, Forge and A1111 find v-prediction and zero terminal SNR in it by the marker keys `v_pred` and `ztsnr`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nai_xl.errors import UserError
from nai_xl.model.export import DTYPES, export
from nai_xl.model.quiet import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(prog="nai_xl.export", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run directory, or a diffusers folder")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        print(export(arguments.run, arguments.file, arguments.dtype))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
