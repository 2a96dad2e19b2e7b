"""Engine failures under a real server: errors of clients, the exit code, and leftover processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import psutil
import pytest
from server_process import MODEL, ROOT, ServerProcess

from megatron_dmc import LLM, SamplingParams

LONG = {
    "model": "tiny",
    "prompt": "def main():\n",
    "max_tokens": 480,
    "extra_body": {"ignore_eos": True},
}
SECONDS = 30
"""Seconds within which the process must end; it takes about three."""


def in_threads(*functions):
    """Start them; returns a function that waits for them and gives their results or errors."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as e:  # noqa: BLE001 - looked at by the test
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()

    def wait():
        for thread in threads:
            thread.join(120)
        return results

    return wait


def health(server):
    """Status and document of /health; None if the server no longer answers."""
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
            return answer.status, None
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)
    except OSError:
        return None, None


def fails_as_it_should(server, break_it, message):
    """Running and new requests get the error, /health too, and the process ends with 1."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = []

        def stream():
            for chunk in client.completions.create(**LONG, stream=True):
                chunks.append(chunk)  # noqa: PERF402 - what came before the error counts

        def whole():
            return client.completions.create(**LONG)

        wait = in_threads(stream, whole)
        while server.get("/live")["num_running"] < 2 or len(chunks) < 3:
            time.sleep(0.02)
        break_it()
        began = time.monotonic()
        statuses = []
        while (now := health(server))[0] is not None:
            statuses.append(now)
            time.sleep(0.05)
        code = server.process.wait(SECONDS)
        assert time.monotonic() - began < SECONDS
        streamed, answered = wait()
    assert code == 1, server.log.read_text()
    assert 503 in dict(statuses), statuses
    error = dict(statuses)[503]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "engine_dead" and message in error["message"]
    assert isinstance(answered, openai.InternalServerError) and answered.status_code == 503, (
        answered
    )
    assert answered.body["code"] == "engine_dead" and message in answered.body["message"]
    assert isinstance(streamed, openai.APIError) and message in str(streamed), streamed
    assert streamed.body["code"] == "engine_dead"


def test_an_exception_in_the_engine(tmp_path):
    fault = tmp_path / "fault"
    with ServerProcess(
        tmp_path, "--dtype", "float32", "--num-pages", "4096",
        program=[str(ROOT / "tests/support/faulty_server.py")], DMC_FAULT=str(fault),
    ) as server:  # fmt: skip
        fails_as_it_should(server, fault.touch, "illegal memory access")


def children(server, module="megatron_dmc.engine.parallel.child"):
    return [
        p
        for p in psutil.Process(server.process.pid).children(recursive=True)
        if module in p.cmdline()
    ]


def test_an_engine_process_that_is_killed(tmp_path):
    with ServerProcess(tmp_path, "--dtype", "float32", "--num-pages", "4096") as server:
        (engine,) = children(server, "megatron_dmc.engine.process")
        fails_as_it_should(server, engine.kill, "was killed by SIGKILL")
    with ServerProcess(tmp_path, "--dtype", "float32", "--num-pages", "4096") as server:
        (engine,) = children(server, "megatron_dmc.engine.process")
        server.kill()
        psutil.wait_procs([engine], timeout=SECONDS)
        assert not engine.is_running(), "it does not outlive the server"


def expected(max_tokens):
    llm = LLM(MODEL, dtype="float32", device="cpu", num_pages=4096)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return llm.generate("import os\n", params, use_tqdm=False)[0].outputs[0].text


@pytest.mark.dist
def test_a_follower_that_is_killed(tmp_path):
    """Tensor parallel over HTTP: one process's tokens, and then a rank dies."""
    with ServerProcess(
        tmp_path, "--dtype", "float32", "--num-pages", "4096", "--tensor-parallel-size", "2"
    ) as server:
        body = {"prompt": "import os\n", "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert json.load(answer)["choices"][0]["text"] == expected(12)
        followers = children(server)
        assert len(followers) == 1
        engine = children(server, "megatron_dmc.engine.process")
        for process in (psutil.Process(server.process.pid), *engine, *followers):
            listening = [
                c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
            ]
            assert listening, "the server, the engine and each rank listen"
            assert all(address.ip in ("127.0.0.1", "::1") for address in listening), listening
        fails_as_it_should(server, followers[0].kill, "rank 1 (process")
        assert not any(p.is_running() for p in followers)


@pytest.mark.dist
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "how", ["stopped while it works", "killed while idle", "parent killed", "SIGTERM"]
)
def test_other_ends_of_a_tensor_parallel_server(tmp_path, how):
    with ServerProcess(
        tmp_path, "--dtype", "float32", "--num-pages", "4096", "--tensor-parallel-size", "4",
        "--distributed-timeout-seconds", "5",
    ) as server:  # fmt: skip
        followers = children(server)
        assert len(followers) == 3
        if how == "stopped while it works":
            fails_as_it_should(server, followers[1].suspend, "rank 2 does not respond")
        elif how == "killed while idle":
            followers[2].kill()
            assert server.process.wait(SECONDS) == 1
            assert "rank 3 (process" in server.log.read_text()
        elif how == "parent killed":
            server.kill()
        else:
            os.kill(
                followers[0].pid, signal.SIGTERM
            )  # as a process manager does to all processes at once
            server.terminate()
            assert server.process.wait(SECONDS) == 0, server.log.read_text()
        _, alive = psutil.wait_procs(followers, timeout=SECONDS)
        assert not alive


@pytest.mark.dist
@pytest.mark.exhaustive
def test_a_server_under_torchrun(tmp_path):
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "megatron_dmc.cli.main",
    ]  # fmt: skip
    with ServerProcess(
        tmp_path, "--dtype", "float32", "--num-pages", "4096", "--tensor-parallel-size", "2",
        "--shutdown-timeout", "20", program=launcher,
    ) as server:  # fmt: skip
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            text = client.completions.create(
                model="tiny", prompt="import os\n", max_tokens=12, temperature=0
            )
            assert text.choices[0].text == expected(12)
        ranks = psutil.Process(server.process.pid).children(recursive=True)
        server.terminate()
        server.process.wait(60)
        _, alive = psutil.wait_procs(ranks, timeout=SECONDS)
        assert not alive
        assert "engine failed" not in server.log.read_text()


def test_wrong_tensor_parallel_size_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dmc.cli.main", "serve", str(MODEL), "--port", "0", "--device", "cpu",
         "--tensor-parallel-size", "3"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "megatron-dmc: error: tensor_parallel_size=3 does not divide the model's"
    )
    assert "Traceback" not in done.stderr
