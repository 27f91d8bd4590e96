"""`python -m sgmv`: what this machine has, and what a GPU or a server would do with many adapters.

A command's module is imported only when it is asked for. To add one, write a `command(parser)` that
adds its arguments and returns the function from what was given to the text to print, and name its
module here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sgmv.errors import SgmvError

# name: module, help
COMMANDS = {
    "info": ("sgmv.info", "CPU features, backend, tiles, threads, cache folder"),
    "explain": ("sgmv.explain.command", "a batch from rows to thread blocks, in every engine"),
    "simulate": ("sgmv.serving.command", "many adapters served: hits, waiting times, bytes"),
    "explorer": ("sgmv.explorer.write", "a page that shows what a GPU would do with a batch"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m sgmv", description="Many LoRA adapters in one batch, on the CPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        its = commands.add_parser(name, help=text)
        if name in arguments[:1]:
            its.set_defaults(run=import_module(module).command(its))
    given = parser.parse_args(arguments)
    try:
        print(given.run(given), flush=True)
    except SgmvError as error:
        parser.exit(2, f"{error}\n")
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
