"""Ops of the paged cache: append, attention, prefill, eviction, pages."""
