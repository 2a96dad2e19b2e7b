"""Random cases of the ops, and their comparison with the specification: for tests, and for benchmarks, which check
before they measure."""
