"""`python -m sgmv info`: what this machine has, and what sgmv makes of it."""

from __future__ import annotations

import argparse

from sgmv.info import info


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sgmv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="CPU features, backend, tiles, threads, cache folder")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
