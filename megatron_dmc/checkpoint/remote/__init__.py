"""Code that is exported with a model: transformers loads it with `trust_remote_code=True`.

The files need torch, transformers and `ops.gates`, and nothing else of this package. `checkpoint.remote_code` copies
them into the model's folder, and `ops/gates.py` as `gates_dmc.py`, from which the copies import.
`modeling_dmc_llama.py` is the template of every family's file.
"""
