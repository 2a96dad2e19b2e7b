"""Ops of training: merge, attention over stock flash kernels, delayed eviction."""
