"""The Megatron-Core model: attention with DMC, layer specs, norms, decisions."""
