"""`hacrl ...`: the operator's commands, and a door for those of other packages.

Nothing heavy is imported here or for `--help`: a command's module is loaded when the command runs.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failure (told in a sentence), 2 wrong usage, 130 Ctrl-C."""
    try:
        from hacrl_exchange.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
