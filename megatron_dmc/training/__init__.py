"""Training through Megatron's own loop: flags, loss, forward step, pipeline carry, CPU adapter."""
