"""The `megatron-dmc` command."""
