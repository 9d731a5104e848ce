"""One process of benchmarks/data.py: a start that looks at a folder of pictures, in any version.

python benchmarks/data_folder.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from resources import Times, tell

from nai_xl.data.source.folder import FolderSource

if __name__ == "__main__":
    clock = Times()
    clock.once("scan", lambda: FolderSource(dir=Path(sys.argv[1])).scan())
    tell(clock.found)
