"""python -m nai_xl.compare experiment=NAME | sweep=NAME | runs='MLflow filter' | DIRECTORY ...: which arm is better?

Pairs the arms over seeds and evaluation items, prints a table and writes <output_dir>/compare-<name>/ with report.html,
results.csv, results.json and the figures. Further: output_dir=, baseline=key=value,..., metrics=a,b, equivalence=2%
(the largest difference that nobody minds), detect=1% (how many seeds that takes), uri= (with runs=), plugins=[mine]
(packages of yours whose evaluators the runs have).
"""

from __future__ import annotations

import sys

from nai_xl import config
from nai_xl.compare.answered import answered
from nai_xl.compare.arguments import arguments
from nai_xl.compare.figures.draw import draw
from nai_xl.compare.report.delivery import log
from nai_xl.compare.report.files import write
from nai_xl.compare.report.screen import show
from nai_xl.compare.selection import select


def main() -> None:
    with config.mistakes_told():
        request = arguments(sys.argv[1:], description=str(__doc__))
        selection = select(request)
        found = answered(selection, recorded=request.of_sweep)
        folder = selection.folder
        files = write(found, folder, draw(found, selection.configs))
        show(found, files)
        if line := log(found, files):
            print(line)


if __name__ == "__main__":
    main()
