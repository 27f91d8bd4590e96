"""`sgmv`, also `python -m sgmv`: this machine, and what a GPU or a server would do with a batch.

A command's module is imported only when it is asked for. To add one, write a `command(parser)` that
adds its arguments and returns the function from what was given to the text to print, and name its
module here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path

from sgmv import __version__
from sgmv.console import Parser, joined
from sgmv.errors import SgmvError

# name: module, help
COMMANDS = {
    "info": ("sgmv.info", "CPU features, backend, tiles, threads, cache folder"),
    "warm-up": ("sgmv.warm_up", "compile the kernels now, before a first call needs them"),
    "adapters": ("sgmv.adapters", "adapters on disk: what they are, and whether they fit a model"),
    "cache": ("sgmv.cache", "the folder of compiled kernels: what is in it, and --clear"),
    "explain": ("sgmv.explain.command", "a batch from rows to thread blocks, in every engine"),
    "simulate": ("sgmv.serving.command", "many adapters served: hits, waiting times, bytes"),
    "explorer": ("sgmv.explorer.write", "a page that shows what a GPU would do with a batch"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names."""
    arguments = joined(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(arguments[:1])
    given = parser.parse_args(arguments)
    try:
        print(given.run(given), flush=True)
    except SgmvError as error:
        parser.refuse(error, given)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        parser.exit(130)


def make_parser(names: Collection[str] = tuple(COMMANDS)) -> Parser:
    """The parser of all commands, with the arguments of those named."""
    prog = "sgmv" if Path(sys.argv[0]).stem == "sgmv" else "python -m sgmv"
    parser = Parser(
        prog=prog,
        description="Many LoRA adapters in one batch, on the CPU.",
        epilog="Completion in bash, zsh or tcsh: pip install shtab, then "
        "shtab --shell=bash --prog sgmv sgmv.__main__.make_parser",
    )
    parser.add_argument("--version", action="version", version=f"sgmv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}."
        subparser = commands.add_parser(name, help=text, description=description)
        if name in names:
            subparser.set_defaults(run=import_module(module).command(subparser))
    return parser


if __name__ == "__main__":
    main()
