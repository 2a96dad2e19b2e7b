"""`LLM(model).generate(prompts, params)`, as in vLLM."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_dmc.checkpoint.chat_template import load_chat_template
from megatron_dmc.engine.build import build_engine
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.parallel.engine import TensorParallelEngine
from megatron_dmc.engine.request import RequestOutput
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.stats import EngineStats
from megatron_dmc.errors import EngineDead, InvalidRequest, RequestFailed


class LLM:
    """A model with its tokenizer and engine.

    With `tensor_parallel_size`, the other ranks are child processes; or, under torchrun, the processes that
    it started: each of them makes an `LLM`, and all except rank 0 call `follow`.

    Args:
        model: a Hugging Face folder, a Megatron checkpoint, a GGUF file or an id of the Hugging Face Hub; or
            a loaded model (`model, description, tokenizer`).
        tokenizer: instead of the model's own: its folder or id, or an object (see `as_tokenizer`).
        make_context: called like `PagedContext`, for benchmarks.
        settings: the fields of `EngineConfig`, by name.

    Raises:
        DMCError: the model cannot be read, or a setting is unknown, invalid or does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        make_context: Callable[..., PagedContext] = PagedContext,
        **settings: Any,
    ):
        config = EngineConfig.from_settings(settings)
        self.engine = build_engine(model, tokenizer, config, make_context=make_context)
        self._num_generated = 0

    def follow(self) -> bool:
        """With tensor parallelism, on ranks other than 0: take part in rank 0's work until it calls `close`.

        Returns:
            False on rank 0, at once; True on the others.

        Raises:
            EngineDead: another rank is lost.
        """
        if not isinstance(self.engine, TensorParallelEngine) or self.engine.parallel.rank == 0:
            return False
        self.engine.follow()
        return True

    def close(self) -> None:
        """End the other ranks of tensor parallelism; nothing can be generated afterwards."""
        self.engine.close()

    def get_tokenizer(self) -> Any | None:
        """The tokenizer in use."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters of requests without their own, from the model's `generation_config.json`."""
        return SamplingParams(**self.engine.default_sampling_params)

    def stats(self) -> EngineStats:
        """The engine's statistics so far."""
        return self.engine.stats()

    def generate(
        self,
        prompts: str | dict | Sequence[str | dict | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts. The outputs are in the prompts' order.

        Args:
            prompts: texts, lists of token ids, or dictionaries (see `read_prompt`); one or several.
            sampling_params: one for all, or one for each; default: `get_default_sampling_params`.
            priority: of each prompt, with the scheduling policy "priority"; lower goes first.

        Raises:
            InvalidRequest: for the first prompt that can never run; none has been started then.
            RequestFailed: an exception of a prompt's own work ended it; raised when the others are done,
                with the `outputs` of all.
        """
        if isinstance(prompts, str | dict):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each"
            )
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if len(priorities) != len(prompts):
            raise InvalidRequest(
                f"{len(priorities)} priorities for {len(prompts)} prompts; give one for each"
            )
        ids: list[str] = []
        try:
            for prompt, p, level in zip(prompts, params, priorities, strict=True):
                request_id = f"generate-{self._num_generated}"
                self._num_generated += 1
                self.engine.add_request(request_id, prompt, p, priority=level)
                ids.append(request_id)
            finished = self._run(len(ids), use_tqdm)
        except EngineDead:
            raise
        except BaseException:
            for request_id in ids:
                self.engine.abort_request(request_id)
            raise
        outputs = [finished[request_id] for request_id in ids]
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RequestFailed(
                f"{len(errors)} of {len(outputs)} prompts failed, the first: {errors[0]}; the other "
                "completions are in this exception's `outputs`",
                outputs,
            )
        return outputs

    def chat(
        self,
        messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` with the prompts that the model's chat template makes of them.

        Args:
            messages: `{"role": ..., "content": ...}` of one conversation, or of each of several.
            chat_template: Jinja, a file, or the name of one of the tokenizer's templates; default: the
                tokenizer's own.
            add_generation_prompt: end with the beginning of an answer.
            chat_template_kwargs: further variables of the template.

        Raises:
            InvalidRequest: there is no template, or it refuses the messages; and as `generate`.
        """
        template = load_chat_template(self.engine.tokenizer, chat_template)
        if template is None:
            raise InvalidRequest(
                "transformers reads no tokenizer of this model, and so no chat template; use generate"
            )
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [
            {
                "prompt_token_ids": template.token_ids(
                    list(conversation), add_generation_prompt=add_generation_prompt,
                    arguments=chat_template_kwargs,
                )
            }
            for conversation in conversations
        ]  # fmt: skip
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        from tqdm import tqdm

        finished: dict[str, RequestOutput] = {}
        with tqdm(total=num_requests, desc="Prompts", unit="", disable=not use_tqdm) as bar:
            while self.engine.has_unfinished_requests:
                for output in self.engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        bar.update()
        return finished
