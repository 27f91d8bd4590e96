"""One HTML page that shows what a GPU would do with a batch: no network, no server, no build.

    write_html ──> page.html, made of
                     style.css
                     batch.js, launch.js, kernels.js        what a batch becomes: the same figures
                     punica, bgmv, vllm, sglang.js          as sgmv.emulator and sgmv.layouts
                     timeline.js, layouts.js
                     colours.js, nodes.js                   what drawings and sentences are made of
                     stories.js, words.js                   the path through SGMV, and its words
                     compare.js, verdict.js, segments.js, time.js, player.js,
                     tiles.js, roof.js, bytes.js, tables.js   a panel each
                     controls.js, address.js, start.js      what is asked for; start.js starts it
                     devices, documents and the batch to start with, as JSON

`python -m sgmv explorer` writes the page and opens it.
"""

from sgmv.explorer.write import write_html

__all__ = ["write_html"]
