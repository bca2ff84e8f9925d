"""`preceptor` and `python -m preceptor`: set what must be set before the libraries load, then run the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Idle OpenMP threads otherwise spin for long, which starves everything else on a shared processor.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Else the first call of a hosted model asks the network for a price table.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        from preceptor.cli import run  # seconds, in which there may be a Ctrl-C, too

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
