"""`python -m a3tune`, as launchers of several processes want it: the command `a3tune`."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109  (a pathlib.py there would be imported)
    # Python looks for modules here first: a torch.py in the folder of a stranger would be run.
    del sys.path[0]

from a3tune.cli import main

if __name__ == "__main__":
    main()
