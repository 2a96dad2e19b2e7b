"""Code that is exported with a model: transformers loads it with `trust_remote_code=True`.

The files need torch and transformers and nothing of this package; `checkpoint.remote_code` copies
them into the model's folder. `modeling_dmc_llama.py` is the template of every family's file.
"""
