"""EleutherAI's lm-eval on the engine: the model, the paper's tasks, and the command.

Nothing is registered with lm-eval by importing this package; `megatron_dmc.quality.lm_eval.model` does that.
"""
