"""One rank of tensor parallelism, started by `engine.parallel.processes` with its orders on standard input."""

import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from typing import BinaryIO

import torch

from megatron_dmc.errors import DMCError, EngineDead


def main() -> int:
    """Load this rank's part of the model and follow rank 0.

    Returns:
        exit code: 0 after rank 0's `close`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 gets these too, and decides
        signal.signal(number, signal.SIG_IGN)
    # rank 0 gives the same warnings
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    orders = sys.stdin.buffer
    rank, size, port, device_type, arguments = pickle.load(orders)
    model, tokenizer, make_context, config = arguments
    threading.Thread(target=_end_with_parent, args=(orders,), daemon=True).start()

    from megatron_dmc.engine.build import build_engine
    from megatron_dmc.engine.parallel.processes import connect, join_group

    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    try:
        join_group(rank, size, connect(rank, size, port), device)
        build_engine(model, tokenizer, config, make_context=make_context).follow()
    except EngineDead as error:
        print(f"megatron-dmc: rank {rank}: {error}", file=sys.stderr)
        return 1
    except DMCError:  # rank 0 meets it too, and tells the user
        return 2
    return 0


def _end_with_parent(orders: BinaryIO) -> None:
    orders.read()
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # without torch's destructors, which would wait for ranks that are gone
    os._exit(code)
