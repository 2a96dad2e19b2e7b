"""`bench serve`, `bench throughput`, `bench latency`: real runs, small; and the arithmetic."""

import asyncio
import json

import pytest
from server_process import MODEL, ServerProcess, compressing_model

from megatron_dmc.bench.load import Answer, summarize
from megatron_dmc.cli.main import main

ENGINE = (str(MODEL), "--device", "cpu", "--dtype", "float32", "--num-pages", "4096")


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_throughput_and_latency(capsys, tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "import os\n", "output_tokens": 5}, {"prompt": "def main():"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    result = run(
        capsys, "throughput", *ENGINE, "--num-prompts", "4", "--output-len", "3",
        "--dataset-path", str(data), "--output", str(tmp_path),
    )  # fmt: skip
    assert result["total_output_tokens"] == 2 * (5 + 3) and result["num_requests"] == 4
    assert result["tokens_per_second"] > result["output_tokens_per_second"] > 0
    assert result["measured_cr"] == 1 and result["peak_pages"] > 0
    assert json.loads((tmp_path / "throughput.json").read_text()) == result
    result = run(
        capsys, "latency", *ENGINE, "--batch-size", "2", "--input-len", "4", "--output-len", "3",
        "--num-iters", "3",
    )  # fmt: skip
    assert len(result["latencies"]) == 3 and result["avg_latency"] > 0
    assert min(result["latencies"]) <= result["percentiles"]["50"] <= max(result["latencies"])


def test_server(capsys):
    """Every token is a chunk, and both processes are measured."""
    result = run(
        capsys, "server", "--tokenizer", str(MODEL), "--streams", "4", "--requests", "2",
        "--output-len", "8", "--step-ms", "10000",
    )  # fmt: skip
    assert result["chunks"] == result["tokens"] == 64
    assert result["front_us_per_chunk"] > 0 and result["seconds"] > 0
    assert main(["bench", "server", "--tokenizer", "nowhere", "--streams", "0"]) == 2
    assert "--streams 0" in capsys.readouterr().err


def test_serve(capsys, tmp_path):
    model = compressing_model(tmp_path / "model")
    with ServerProcess(tmp_path, "--dtype", "float32", "--api-key", "k", model=model) as server:
        common = ("serve", "--base-url", server.url, "--api-key", "k")
        result = run(
            capsys, *common, "--num-prompts", "6", "--request-rate", "50", "--random-input-len", "20",
            "--random-output-len", "8", "--random-range-ratio", "0.5", "--ignore-eos",
            "--goodput", "e2el:1000000", "--metric-percentiles", "25,99.9", "--max-concurrency", "3",
            "--output", str(tmp_path / "out.json"),
        )  # fmt: skip
        live = server.wait_until_idle()
        assert result["completed"] == 6 and result["failed"] == 0 and result["model"] == "tiny"
        assert result["total_output_tokens"] == live["num_generated_tokens"]
        assert result["total_input_tokens"] == live["num_prompt_tokens"]
        assert result["request_goodput"] == result["request_throughput"] > 0
        assert result["mean_e2el_ms"] > result["mean_ttft_ms"] > 0 and result["mean_tpot_ms"] > 0
        assert result["p25_itl_ms"] <= result["p99.9_itl_ms"]
        assert result["mean_measured_cr"] > 1.1
        assert json.loads((tmp_path / "out.json").read_text()) == result
        # one of the two prompts is too long for the context
        data = tmp_path / "prompts.jsonl"
        data.write_text('{"prompt": "x"}\n{"prompt": [5, 6], "output_tokens": 600}\n')
        half = run(
            capsys, *common, "--num-prompts", "4", "--dataset-path", str(data),
            "--random-output-len", "2",
        )  # fmt: skip
        assert (half["completed"], half["failed"]) == (2, 2)
        for flags, message in (
            (("--api-key", "wrong"), "/v1/models does not answer"),
            (("--model", "other"), "every request failed; the first: status 404"),
            (("--goodput", "speed:1"), "--goodput speed:1"),
            (("--request-rate", "0"), "--request-rate"),
            (("--extra-body", "[]"), "--extra-body"),
            (("--extra-body", '{"top_k": -7}'), "top_k"),
            (("--dataset-path", "nowhere"), "nowhere"),
            (("--metric-percentiles", "101"), "101"),
        ):
            assert main(["bench", *common, "--num-prompts", "2", *flags]) == 2
            assert message in capsys.readouterr().err
    assert main(["bench", *common]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_figures():
    a = Answer(10, 5, ttft=0.1, e2el=0.6, last_token=0.5, itl=[0.1] * 4)
    b = Answer(20, 1, ttft=0.3, e2el=0.3, last_token=0.3)
    c = Answer(error="status 500")
    assert a.tpot == pytest.approx(0.1) and b.tpot is None
    s = summarize([a, b, c], 2.0, {"ttft": 0.2, "tpot": 0.2}, [50, 100])
    assert (s["completed"], s["failed"]) == (2, 1)
    assert (s["request_throughput"], s["request_goodput"]) == (1.0, 0.5)
    assert (s["output_throughput"], s["total_token_throughput"]) == (3.0, 18.0)
    assert s["mean_ttft_ms"] == pytest.approx(200) and s["p100_ttft_ms"] == pytest.approx(300)
    assert s["mean_tpot_ms"] == pytest.approx(100) and s["p50_itl_ms"] == pytest.approx(100)
    assert s["mean_measured_cr"] is None


def test_a_broken_stream_is_a_failure():
    """A server that closes before [DONE], and one that reports an error within the stream."""
    import aiohttp

    from megatron_dmc.bench.load import request

    bodies = {
        b"/short": b'data: {"choices": [{"text": "x"}]}\n\n',
        b"/error": b'data: {"error": {"message": "the engine failed"}}\n\ndata: [DONE]\n\n',
        b"/junk": b"data: {nonsense\n\n",
    }

    async def answer(reader, writer):
        path = (await reader.readline()).split()[1]
        while (await reader.readline()).strip():
            pass
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bodies[path])
        await writer.drain()
        writer.close()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            return [await request(session, path.decode(), {}) for path in bodies]

    short, error, junk = asyncio.run(ask())
    assert "broke off" in short.error and "engine failed" in error.error and junk.error


def test_a_first_token_without_text_is_timed():
    """Half of a character, of a completion; and of a chat, behind a chunk that only has the role."""
    import aiohttp

    from megatron_dmc.bench.load import request

    pause = 0.15
    early = {"role": "assistant", "content": ""}
    streams = {
        b"/completions": [{"text": ""}, {"text": "x"}],
        b"/chat": [{"delta": early}, {"delta": {"content": ""}}, {"delta": {"content": "x"}}],
    }

    async def answer(reader, writer):
        path = (await reader.readline()).split()[1]
        while (await reader.readline()).strip():
            pass
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for choice in streams[path]:
            await asyncio.sleep(pause)
            writer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            await writer.drain()
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            return [await request(session, path.decode(), {}) for path in streams]

    for result, num_pauses in zip(asyncio.run(ask()), (1, 2), strict=True):
        assert result.error is None and len(result.itl) == 1
        # the last chunk with text is a pause later
        assert result.ttft == pytest.approx(result.e2el - pause, abs=0.9 * pause)
        assert result.ttft >= num_pauses * pause
        assert result.tpot == pytest.approx(result.itl[0])
