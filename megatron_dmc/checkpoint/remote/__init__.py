"""Code that is exported with a model: transformers loads it with `trust_remote_code=True`.

The files need torch, transformers, `config`, `errors` and `ops.gates`, and nothing else of this package.
`checkpoint.remote_code` copies all of them into the model's folder.
`modeling_dmc_llama.py` is the template of every family's file.
"""
