"""Training through Megatron's own loop: flags, loss, forward step, pipeline carry, CPU adapter.

The names that your own training script needs (`examples/pretrain_gpt.py`). They are imported on first use, so that
importing the package does not load Megatron's training.
"""

import importlib

_HOMES = {
    "CompressionLoss": "megatron_dmc.training.step",
    "DMCGPTModel": "megatron_dmc.model.build",
    "DecisionRecorder": "megatron_dmc.model.decisions",
    "add_dmc_args": "megatron_dmc.training.arguments",
    "dmc_layer_spec": "megatron_dmc.model.specs",
    "document_starts": "megatron_dmc.training.step",
    "prepare_pipeline": "megatron_dmc.training.run",
    "transformer_config_from_args": "megatron_dmc.training.arguments",
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
    return getattr(importlib.import_module(_HOMES[name]), name)
