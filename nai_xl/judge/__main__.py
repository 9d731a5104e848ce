"""python -m nai_xl.judge A B ... [key=value ...]: finished models of any origin on the same items; A is the baseline.

A model is a run directory, a diffusers folder or a .safetensors file. Several of one method, with different seeds, are
one side: A0,A1,A2 or 'outputs/ztsnr-*'. A side can have a name: ours=A0,A1 theirs=B0,B1. What a model does not say of
itself is told by flags such as B.parameterization=v. docs/judge.md has them all.
"""

from __future__ import annotations

import sys

from nai_xl import config
from nai_xl.judge.arguments import arguments
from nai_xl.judge.trial import Trial
from nai_xl.model.quiet import quiet_libraries


def main() -> None:
    quiet_libraries()
    with config.mistakes_told():
        trial = Trial.of(arguments(sys.argv[1:], description=str(__doc__)))  # refuses; no weight is read
        print(*trial.introduced(), sep="\n", flush=True)
        trial.run()


if __name__ == "__main__":
    main()
