"""The front of a server starts in the time of its own packages."""

import subprocess
import sys

_IMPORTS = """
import sys
import megatron_dmc.cli.serve
import megatron_dmc.engine.async_llm
import megatron_dmc.engine.process
import megatron_dmc.server.app
import megatron_dmc.server.http
from megatron_dmc.checkpoint import chat_template, tokenizer
from megatron_dmc.engine import AsyncLLM, EngineStats, RequestStream
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "megatron", "transformers"}))
"""


def test_the_front_imports_neither_torch_nor_megatron():
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
