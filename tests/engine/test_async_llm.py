"""`AsyncLLM`: the same tokens as the engine alone; aborts, slow readers, failure, shutdown."""

import asyncio
import itertools
import time
from pathlib import Path

import pytest
import torch

from megatron_dmc import LLM, AsyncLLM, SamplingParams
from megatron_dmc.errors import EngineDead, InvalidRequest

MODEL = Path(__file__).parents[2] / "examples/models/stdlib-llama-3m"
PROMPTS = ["def main():\n", "import os\n", "class A:\n", "for i in range(10):\n"]


def make(**arguments):
    arguments = {"device": "cpu", "dtype": "float32", "num_pages": 2048, **arguments}
    return AsyncLLM.from_model(MODEL, **arguments)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def collect(llm, prompt, params, request_id=None):
    outputs = [output async for output in llm.generate(prompt, params, request_id)]
    assert outputs[-1].finished and not any(o.finished for o in outputs[:-1])
    for before, after in itertools.pairwise(outputs):
        assert after.outputs[0].text.startswith(before.outputs[0].text)
    return outputs


def test_many_at_a_time_equal_each_alone():
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=12 + i)
        for i, t in enumerate((0.0, 1.0, 0.7, 0.0))
    ]
    alone = LLM(MODEL, device="cpu", dtype="float32", num_pages=2048, max_num_seqs=1)
    want = [alone.generate(p, q, use_tqdm=False)[0] for p, q in zip(PROMPTS, params, strict=True)]
    llm = make()

    async def main():
        runs = [collect(llm, p, q) for p, q in zip(PROMPTS, params, strict=True)]
        return await asyncio.gather(*runs)

    for outputs, w in zip(asyncio.run(main()), want, strict=True):
        assert outputs[-1].outputs[0].token_ids == w.outputs[0].token_ids
        assert outputs[-1].outputs[0].text == w.outputs[0].text
    # a second event loop may use the same object
    again = asyncio.run(collect(llm, PROMPTS[0], params[0]))
    assert again[-1].outputs[0].token_ids == want[0].outputs[0].token_ids
    llm.shutdown()


def test_refusal_abort_and_cancellation_free_the_pages():
    llm = make()
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    async def idle():
        deadline = time.monotonic() + 20
        while (stats := await llm.stats()).num_running or stats.num_pages_in_use:
            assert time.monotonic() < deadline, stats
            await asyncio.sleep(0.02)
        assert not llm.unfinished()

    async def main():
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await collect(llm, [10**6], long)
        with pytest.raises(InvalidRequest, match="neither a text nor token ids"):
            await collect(llm, [None], long)
        # leaving the loop
        generator = llm.generate(PROMPTS[0], long, "left")
        async for output in generator:
            if len(output.outputs[0].token_ids) > 2:
                break
        await generator.aclose()
        await idle()
        # cancelling the task
        task = asyncio.create_task(collect(llm, PROMPTS[1], long, "cancelled"))
        while not any(s.token_ids for s in llm.unfinished()):
            await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequest, match="id is in use"):
            await collect(llm, PROMPTS[1], long, "cancelled")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle()
        # abort by id ends the stream with what there is
        stream = await llm.add_request(PROMPTS[2], long, "aborted")
        first = await anext(stream)
        assert not first.finished
        await llm.abort("aborted")
        rest = [output async for output in stream]
        assert rest[-1].outputs[0].finish_reason == "abort"
        await llm.abort("nobody")
        await idle()
        assert await collect(llm, PROMPTS[3], SamplingParams(max_tokens=3))

    asyncio.run(main())
    llm.client.engine.context.pool.check_integrity()
    llm.shutdown()


def test_a_slow_reader_stalls_nobody_and_costs_no_memory():
    llm = make()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

    async def main():
        slow = await llm.add_request(PROMPTS[0], params)
        quick = await collect(llm, PROMPTS[1], params)
        while not slow.finished:
            await asyncio.sleep(0.01)
        return quick, [output async for output in slow]

    quick, slow = asyncio.run(main())
    assert len(quick[-1].outputs[0].token_ids) == 60
    # never read until the end: one output, with everything in it
    assert len(slow) == 1 and len(slow[0].outputs[0].token_ids) == 60
    llm.shutdown()


def test_failure_and_shutdown_end_every_stream(caplog):
    llm = make()
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    run, steps = llm.client.engine.runner._forward, []

    def failing(*args):
        steps.append(1)
        if len(steps) > 5:
            raise RuntimeError("CUDA error: device lost")
        return run(*args)

    llm.client.engine.runner._forward = failing

    async def main():
        both = await asyncio.gather(
            *(collect(llm, p, params) for p in PROMPTS[:2]), return_exceptions=True
        )
        assert all(isinstance(e, EngineDead) and "device lost" in str(e) for e in both), both
        for call in (collect(llm, PROMPTS[0], params), llm.stats()):
            with pytest.raises(EngineDead, match="device lost"):
                await call
        await llm.abort("anything")

    asyncio.run(main())
    assert "device lost" in str(llm.failure)
    llm.shutdown()

    llm = make()

    async def stopped():
        stream = await llm.add_request(PROMPTS[0], params)
        await anext(stream)
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(EngineDead, match="shut down"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead, match="shut down"):
            await llm.stats()

    asyncio.run(stopped())
