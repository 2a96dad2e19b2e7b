"""A real server in a process of its own, for tests and the soak."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/models/stdlib-llama-3m"
PROGRAM = ("-m", "megatron_dmc.cli.main")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}# {{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant: {% endif %}"
)


def compressing_model(folder):
    """The example model with a threshold at which many of its tokens merge (its texts suffer)."""
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    config["dmc"] = {"stage": "finetune", "target_cr": 2.0, "alpha_offset": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ServerProcess:
    """`megatron-dmc serve MODEL`; `url` once it answers. Leaving the context ends it.

    Attributes:
        log: file with its output.
    """

    def __init__(self, folder, *flags, model=MODEL, program=PROGRAM, **environment):
        self.log = Path(folder) / "server.log"
        command = [
            sys.executable, *program, "serve", str(model), "--port", "0", "--served-model-name", "tiny", "--device", "cpu", *flags,
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )
        self.url = self._wait_until_it_answers(300)

    def _wait_until_it_answers(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(r"serving .* at (http://\S+):", self.log.read_text())
            if found:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{found[1]}/health", timeout=60).close()
                    return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"no answer after {seconds} s:\n{self.log.read_text()}")

    def get(self, path):
        """The JSON document at a path."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=300) as answer:
            return json.load(answer)

    def wait_until_idle(self, seconds=300):
        """Until no request is left; every page must be free then."""
        deadline = time.monotonic() + seconds
        while (live := self.get("/live"))["num_requests"] or live["num_in_progress"]:
            assert time.monotonic() < deadline, f"stuck: {live['requests']}"
            time.sleep(0.05)
        assert (live["num_running"], live["num_waiting"], live["num_pages_in_use"]) == (0, 0, 0)
        return live

    def terminate(self):
        """Ask for a clean end."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self):
        """End it now."""
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
