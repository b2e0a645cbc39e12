"""``python -m tests.windows make``, ``run ARGUMENTS`` and ``test``: see ``make test-windows``."""

from __future__ import annotations

import sys
import time

from tests.windows import build, wine


def main(line: list[str]) -> int:
    """Do what is asked; 0 if it went well, or could not be done here."""
    if not build.is_made():
        start = time.monotonic()
        try:
            build.make()
        except build.CannotBuild as error:
            print(f"SKIPPED: nothing was tested on Windows, as there is none here: {error}")
            return 0
        print(f"made a Windows Python in {build.root()}: {time.monotonic() - start:.0f} s")
    what, *rest = line
    if what == "run":
        return wine.stream(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
