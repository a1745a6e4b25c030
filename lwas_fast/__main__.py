"""``python -m lwas_fast``: what is installed and which implementations are active.

``--build`` builds the compiled update now, where it would be built at first use: before a run on many machines, say.
"""

import argparse
import logging
from pathlib import Path

from lwas_fast.installed import build, describe


def main() -> None:
    """Print the table; with ``--build`` fail where there is no compiled update in the end."""
    parser = argparse.ArgumentParser(prog="python -m lwas_fast", description="What is installed and what is active.")
    parser.add_argument("--build", action="store_true", help="build the compiled update now, not at first use")
    wants_build = parser.parse_args().build
    logging.basicConfig(format="%(message)s")
    built = build() if wants_build else True
    rows = [*describe(), ("from", str(Path(__file__).parent))]
    width = max(len(what) for what, _ in rows)
    for what, which in rows:
        print(f"{what:<{width}}  {which}")
    raise SystemExit(not built)


if __name__ == "__main__":
    main()
