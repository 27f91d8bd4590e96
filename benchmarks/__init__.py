"""Timings of sgmv against numpy and torch, on layer shapes of real models.

    python -m benchmarks            about a minute: gate, ceilings, timings, table, record
    python -m benchmarks --full     every layer, rank, row count and popularity

The way of a run, one file per stage:

    models -> grid -> batch -> gate -> ceilings -> timing -> record -> table, figures, readme
                        |        |                   |
                        +------ peers (the baselines) +

`machine` names the machine, `console` prints with or without rich. The words `n`, `r`, `h_in`,
`h_out`, `S` are those of the library.
"""
