"""Where Megatron 0.19.2 falls short of what it is asked to do here; entry points call these.

Each is an explicit call; importing this module changes nothing.
"""

import functools

import torch


def skip_needless_compilation() -> None:
    """Megatron runs `make` for its dataset helper, which the wheel ships compiled and without a
    Makefile; where the helper imports, there is nothing to compile."""
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def let_distributed_optimizer_resume() -> None:
    """Let `--use-distributed-optimizer` load its checkpoint where there is no Transformer Engine or Apex.

    Megatron then trains with torch's Adam, and twice forgets that its step is a tensor of every
    parameter's state: it reads the step before there is any state (`assert len(steps) == 1`), and it
    gives all parameters one and the same tensor, which every one of them then counts up.
    """
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(cls.load_state_dict, "__wrapped__"):
        return
    shard, load = cls.sharded_state_dict, cls.load_state_dict

    @functools.wraps(shard)
    def sharded_state_dict(self, model_sharded_state_dict=None, is_loading=False, **options):
        if is_loading and not self.optimizer.state and isinstance(self.optimizer, torch.optim.Adam):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    state = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                    self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **state}
        return shard(self, model_sharded_state_dict or {}, is_loading, **options)

    @functools.wraps(load)
    def load_state_dict(self, state_dict):
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls.sharded_state_dict, cls.load_state_dict = sharded_state_dict, load_state_dict
