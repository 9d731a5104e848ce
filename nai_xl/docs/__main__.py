"""python -m nai_xl.docs [--check]"""

from __future__ import annotations

import argparse
import sys

from nai_xl import config
from nai_xl.docs.checkout import root, stale, write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nai_xl.docs",
        description="Write docs/groups and the tables of options in README.md and docs/config.md from conf/.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and name what is out of date")
    arguments = parser.parse_args()
    with config.mistakes_told():
        changed = stale(root()) if arguments.check else write(root())
    for name in changed:
        print(f"out of date: {name}" if arguments.check else f"written: {name}")
    if arguments.check and changed:
        sys.exit("run python -m nai_xl.docs, or make docs")


if __name__ == "__main__":
    main()
