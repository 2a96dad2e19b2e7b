"""Benchmarks: commands whose last line of output is one JSON document.

    command          the table of `megatron-dmc bench NAME`, and the flags; no torch
    output           rows, cases, plots, tables, the last line; no torch
    measure          timing, ceilings, the cost of a model, the document
    kernels          decode_kernels (K4, K5) with libraries, prefill_kernels (K6), train_kernels (K1, K2)
    training         train_step (K3)
    engine           model_under_test makes engines with imposed decisions; offline (throughput, latency) gives them
                     requests, decode_step fills their caches; host; baselines to compare with; peers/
    serving          load (serve), server with stub_engine
    many at once     suite of commands; window: table and processes of its stages, which run the cases of the others

A kernel benchmark is a function `cases(...)` that lists its measurements; its command and the window run the list.
"""
