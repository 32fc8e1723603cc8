"""`python -m world COMMAND`: make the synthetic world and everything that ships.

    render    videos with exact annotations
    pretrain  a small video network
    probe     linear probes of video networks
    glove     the shipped word vectors
    ship      copy the best student and the networks into the wheel's folder

`python -m world COMMAND --help` lists the options; `make world` runs the whole chain.
"""

from __future__ import annotations

import sys
from importlib import import_module

from mmdist_e2e.structures import MmdistError

MODULES = {
    "render": "make",
    "pretrain": "pretrain",
    "probe": "probe",
    "glove": "glove",
    "ship": "ship",
}


def main() -> None:
    """Run the command; each has its options in its own module."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}")
        return
    if command not in MODULES:
        sys.exit(f"There is no command {command!r}; valid: {', '.join(MODULES)}.")
    sys.argv[:] = [f"python -m world {command}", *sys.argv[2:]]
    try:
        import_module(f"world.{MODULES[command]}").main()
    except MmdistError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
