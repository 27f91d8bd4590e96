"""`python -m sgmv explain`: one batch, from the ids of its rows to the thread blocks of a GPU.

    group       rows -> sorted rows -> segments
    layout      the same batch in every engine's metadata
    tasks       what sgmv does with it on this machine: row blocks, tasks, tiles
    shrink      Punica's shrink: steps of 64 rows, and what zeros fill of them
    barrier     its split of K, and the barrier at which the release before 1.1.0 hung
    expand      its expand: tiles of 32 rows x 128 columns
    launches    every engine's kernels on one GPU, in figures
    popularity  the same number of rows as Punica's paper mixes them, on the roofline
    experts     adapters on experts, as vLLM pads and launches them: mostly zeros

Without a VIEW: group and launches, which fit one screen.
"""
