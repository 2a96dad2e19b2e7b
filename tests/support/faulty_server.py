"""`megatron-dmc` whose engine fails in the first step after the file named by DMC_FAULT is there."""

import os
import sys

from megatron_dmc.cli.main import main
from megatron_dmc.engine.runner import ModelRunner

run = ModelRunner.run


def faulty(self, *args):
    if os.path.exists(os.environ["DMC_FAULT"]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return run(self, *args)


if __name__ == "__main__":
    ModelRunner.run = faulty
    sys.exit(main())
