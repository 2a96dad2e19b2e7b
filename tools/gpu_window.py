"""Check and measure the kernels and the engine on one GPU within ten minutes, from a checkout that need not be
installed: `megatron-dmc bench window` (docs/performance.md).

    python3 tools/gpu_window.py --budget 500 --output results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dmc.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "window", *sys.argv[1:]]))
