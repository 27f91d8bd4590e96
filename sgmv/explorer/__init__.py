"""One HTML page that shows what a GPU would do with a batch: no network, no server, no build.

    write_html ──> page.html, in which stand
                     style.css
                     emulator.js, timeline.js, layouts.js   what a batch becomes: the same figures
                                                            as sgmv.emulator and sgmv.layouts
                     nodes.js, panels.js, player.js         drawings and sentences
                     controls.js                            what is asked for; starts the page
                     devices and the batch to start with, as JSON

`python -m sgmv explorer` writes the page and opens it.
"""

from sgmv.explorer.write import write_html

__all__ = ["write_html"]
