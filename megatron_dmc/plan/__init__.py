"""Cost of a retrofit: memory of a layout, layouts that fit, tokens and GPU-hours.

    presets.py, model.py  what to train: well-known models and Hugging Face folders
    layout.py             how it is spread over GPUs, and which spreads Megatron and DMC take
    memory.py             bytes on the fullest GPU
    assumptions.py        figures of GPUs and links
    timing.py             seconds of a step, steps of a retrofit
    arguments.py          flags of `megatron-dmc plan`
    command.py            the command: search, table, flags, JSON

Parameter counts are exact; everything else is an estimate from stated assumptions.
"""
