"""docs/punica.md's pictures: each command on the page, and what it prints on 80 columns.

python -m tests.help.punica_page    run the commands and write their pictures anew
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from unittest import mock

from sgmv.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "punica.md"
COMMAND = re.compile(r"```console\n\$ sgmv ([^\n]+)\n.*?```", re.DOTALL)


def printed(arguments: str) -> str:
    """What `sgmv` prints into a pipe, with these arguments."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        mock.patch.dict(os.environ, COLUMNS="80"),
    ):
        main(shlex.split(arguments))
    return output.getvalue()


def rendered(page: str) -> str:
    """The page with every picture drawn anew."""
    return COMMAND.sub(lambda found: f"```console\n$ sgmv {found[1]}\n{printed(found[1])}```", page)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
