"""Run common OpenAI clients, each in a small run against the server.

    python tests/clients/run_clients.py                       # installs them with pip into build/clients
    python tests/clients/run_clients.py --python PATH         # uses this environment, which has them
    python tests/clients/run_clients.py --only litellm --url http://localhost:8000

The server runs where this script does; `--url` takes a running one, which must serve the model `tiny`
with a chat template. Prints a table, and a JSON document as the last line; exit code 1 if a client did
not complete all its requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from one_client import CLIENTS
from server_process import CHAT_TEMPLATE, ServerProcess


def environment():
    """An interpreter that has the clients."""
    folder = ROOT / "build/clients"
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return python


def run(python, name, url, folder, seconds):
    """The client's line; its output goes to standard error if it fails."""
    command = [python, HERE / "one_client.py", name, url, folder]
    none = {"client": name, "version": None, "requests": None, "completed": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder)
    except subprocess.TimeoutExpired:
        print(f"{name}: no end after {seconds} s", file=sys.stderr)
        return none
    if done.returncode != 0:
        print(done.stderr[-4000:], file=sys.stderr)
        return none
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", type=Path, help="interpreter that has the clients")
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=600, help="for each client")
    args = parser.parse_args()
    python = args.python or environment()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--chat-template", CHAT_TEMPLATE, "--num-pages", "16384")
        server = nullcontext() if args.url else ServerProcess(folder, *flags)
        with server:
            for name in args.only:
                place = Path(folder, name)
                place.mkdir()
                lines.append(run(python, name, args.url or server.url, place, args.seconds))
                print(
                    "| {client} | {version} | {completed} of {requests} |".format(**lines[-1]),
                    flush=True,
                )
    print(json.dumps({"clients": lines}))
    return int(any(line["completed"] != line["requests"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
