"""Begin the `foldcp` command in a process that imports nothing from the working folder.

`python -m foldcp` would search the working folder first: a file `yaml.py` beside somebody's inputs
would run in every rank. A script's own folder comes first instead, which holds nothing else.
"""

import sys
from pathlib import Path

del sys.path[0]
root = str(Path(__file__).resolve().parents[3])
if root not in sys.path:  # not installed: what started this process ran from a clone
    sys.path.append(root)

from foldcp.cli.main import main  # noqa: E402

if __name__ == "__main__":  # not again in a worker that is spawned
    main()
