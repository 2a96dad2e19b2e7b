"""Hugging Face folders and Megatron `torch_dist` checkpoints, and the way between them."""
