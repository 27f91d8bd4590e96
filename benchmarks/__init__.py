"""Timings of sgmv against numpy, torch and MKL, on layer shapes of real models.

    python -m benchmarks            about a minute: gate, ceilings, timings, table, record
    python -m benchmarks --full     every layer, rank, row count and popularity
    python -m benchmarks growth     how time grows with rows and with adapters
    python -m benchmarks compat     vLLM's calls against what vLLM does, time and memory
    python -m benchmarks peft       what LoRA adds to a PEFT model's forward pass

The way of a run, one file per stage:

    models -> grid -> batch -> gate -> ceilings -> timing -> record -> table, figures, readme
                        |        |                   |
                        +------ peers (the baselines) +

`peers_numpy`, `peers_torch` and `peers_mkl` hold what `peers` names; `growth`, `compat` and `peft`
go their own ways from `timing` on; `machine` names the machine, `console` prints with or without
rich. The words `n`, `r`, `h_in`, `h_out`, `S` are those of the library.
"""
