"""One HTML page that shows what a GPU would do with a batch: no network, no server, no build.

    write_html ──> page.html with, inlined,  style.css
                                             emulator.js   sgmv/emulator again, the same figures
                                             panels.js     controls, drawings, words
                                             devices and the batch to start with, as JSON

`python -m sgmv explorer` writes the page and opens it.
"""

from sgmv.explorer.write import write_html

__all__ = ["write_html"]
