"""A page as one HTML file that asks nothing of the network, and where it is shown."""

from __future__ import annotations

import json
import os
import re
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any


def assembled(read: Callable[[str], str], data: dict[str, Any]) -> str:
    """page.html with all that it names put in its place, and the data as JSON; `read` has files."""

    def style(found: re.Match[str]) -> str:
        return f"<style>\n{read(found[1])}</style>"

    def script(found: re.Match[str]) -> str:
        return f"<script>\n{read(found[1])}</script>"

    page = re.sub(r'<link rel="stylesheet" href="(.+?)">', style, read("page.html"))
    page = re.sub(r'<script src="(.+?)"></script>', script, page)
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("</", "<\\/")  # a device's name may not end the element
    return page.replace(' id="data">', f' id="data">{text}', 1)


def presented(path: Path, no_open: bool = False) -> str:
    """Open a page where there is a screen; returns what to print of it."""
    address = path.resolve().as_uri()
    screen = sys.platform in ("darwin", "win32") or os.environ.get(
        "DISPLAY", os.environ.get("WAYLAND_DISPLAY")
    )
    if no_open:
        return f"written: {address}"
    opened = bool(screen) and webbrowser.open(address)
    return f"{'opened' if opened else 'written; open it in a browser'}: {address}"
