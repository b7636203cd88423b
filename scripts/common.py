"""What every script shares: one line and exit code 2 for a user's mistake, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from minipeft.errors import MinipeftError


def run(main: Callable[[], None]) -> None:
    """Call a script's main; a MinipeftError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except MinipeftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
