"""Timings of sgmv against numpy, torch and MKL, on layer shapes of real models.

    python -m benchmarks            about a minute: gate, ceilings, timings, table, record
    python -m benchmarks --full     every layer, rank, row count and popularity
    python -m benchmarks growth     how time grows with rows and with adapters
    python -m benchmarks layer      what LoRA adds to a layer, right after its base product
    python -m benchmarks compat     vLLM's calls against what vLLM does, time and memory
    python -m benchmarks peft       what LoRA adds to a PEFT model's forward pass
    python -m benchmarks vllm       what LoRA adds in vLLM's CPU engine
    python -m benchmarks paper      Punica's roofline and microbenchmarks
    python -m benchmarks against  this tree beside another commit, in turn
    python -m benchmarks pages      tables and figures of the pages, from the committed records
    python -m benchmarks report     one HTML page of records, to sort, to filter and to compare

Each of them is a `study.Study` in `studies/`, which `registry` lists. What they share:

    machine -> record -> clock -> gate, ceilings -> study -> text, figures, pages, report

`batch` has a case's arrays and `peers` the baselines. The words `n`, `r`, `h_in`, `h_out`, `S` are
those of the library.
"""
