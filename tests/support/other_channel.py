"""A pytest plugin (`-p other_channel`): borrow another channel of the heads, in Python and in Triton."""

from megatron_dmc.ops import gates

gates.BORROWED_CHANNEL = gates.DECISION_CHANNEL = gates.IMPORTANCE_CHANNEL = 1
