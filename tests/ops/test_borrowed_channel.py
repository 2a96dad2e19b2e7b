"""The borrowed channel is one constant: with another one the ops, kernels and engine still equal the reference."""

from kernel_tools import run_cases

CASES = (
    "(append_equals and 1-64-32) or (prefill_equals and 3-2) or dtype0-heads0-2"  # Triton
    " or (reference_and_dense_formula and chunks0-2-0) or full_forwards_tokens"  # PyTorch
)


def test_with_another_channel():
    run_cases(
        "-p", "other_channel", "kernel_cases_decode.py", "kernel_cases_prefill.py",
        "kernel_cases_near.py", "../ops/test_cache_ops.py", "../ops/test_delayed.py",
        "-k", CASES, TRITON_INTERPRET="1",
    )  # fmt: skip
