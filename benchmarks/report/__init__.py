"""The report: one HTML page made from records, in the look of `sgmv.explorer`.

    records/*.json ──> write.py ──> page.html, made of
                                      the explorer's style.css, nodes.js, colours.js; report.css
                                      records.js               figures, held equal to Python's
                                      plot.js                  axes and marks
                                      spread.js, sortable.js   a figure and a table used twice
                                      summary.js, latency.js, roof.js, cases.js, beside.js,
                                      growth.js, studies.js    a panel each
                                      controls.js, start.js    what is chosen, and the address
                                      the records, as JSON

`python -m benchmarks report` writes the page and opens it.
"""
