"""`python -m recon.certificate ENGINE` prints the certificate of a built engine, after checking its hashes."""

from __future__ import annotations

import sys
from pathlib import Path

from recon.certificate.text import lines
from recon.console import console
from recon.errors import ReconError


def main(arguments: list[str]) -> int:
    """0 when a certificate was printed, 1 with a message otherwise."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write(f"{__doc__}\n")
        return 1
    try:
        for line in lines(Path(arguments[0])):
            console().print(line, markup=False, highlight=False, soft_wrap=True)
    except ReconError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
