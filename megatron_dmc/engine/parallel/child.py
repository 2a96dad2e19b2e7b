"""A tensor-parallel rank that rank 0 has spawned: `python -m megatron_dmc.engine.parallel.child`.

It receives its arguments on standard input, and ends when the pipe closes: no child outlives rank 0.
"""

import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from megatron_dmc.engine.parallel.children import HOST, join_group
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
    pipe = sys.stdin.buffer
    rank, size, port, device_type, arguments = pickle.load(pipe)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()

    from megatron_dmc.engine.build import build_engine  # slow, and with Megatron's warnings

    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    try:
        store = dist.TCPStore(HOST, port, size, is_master=False, wait_for_workers=False)
        store.set(f"here-{rank}", "1")
        join_group(rank, size, store, device)
        model, tokenizer, make_context, config = arguments
        engine: Any = build_engine(model, tokenizer, config, make_context=make_context)
        engine.follow()
    except EngineDead as error:
        print(f"megatron-dmc: rank {rank}: {error}", file=sys.stderr)
        return 1
    except DMCError:  # raised on rank 0 too, which reports it
        return 2
    return 0


def _end_with_parent(pipe: BinaryIO) -> None:
    pipe.read()
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # without torch's destructors, which would wait for ranks that are gone
    os._exit(code)
