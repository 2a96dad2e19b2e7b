"""`megatron-dmc` whose engine fails in the first step after the file named by DMC_FAULT is there."""

import os
import sys

from megatron_dmc.cli.main import main
from megatron_dmc.engine import process
from megatron_dmc.engine.build import build_engine
from megatron_dmc.engine.runner import ModelRunner

run = ModelRunner._forward


def faulty(self, *args):
    if os.path.exists(os.environ["DMC_FAULT"]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return run(self, *args)


def build_faulty_engine(*args):
    ModelRunner._forward = faulty
    return build_engine(*args)


if __name__ == "__main__":
    import faulty_server  # by the name that the engine's process knows

    process.build_engine = faulty_server.build_faulty_engine
    sys.exit(main())
