"""Training through Megatron's own loop: flags, loss, forward step, pipeline carry, CPU adapter.

What a training script of your own needs (`examples/pretrain_gpt.py`) is found here by name; it is
imported when it is asked for, so that importing the package does not load Megatron's training.
"""

import importlib

_HOMES = {
    "CompressionLoss": "step",
    "DMCGPTModel": "model",
    "DecisionRecorder": "model",
    "add_dmc_args": "arguments",
    "dmc_layer_spec": "model",
    "document_starts": "step",
    "prepare_pipeline": "run",
    "transformer_config_from_args": "arguments",
}

__all__ = [
    "CompressionLoss",
    "DMCGPTModel",
    "DecisionRecorder",
    "add_dmc_args",
    "dmc_layer_spec",
    "document_starts",
    "prepare_pipeline",
    "transformer_config_from_args",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
