"""What a caller gets to see of a request."""

from megatron_dmc.engine.detokenizer import IncrementalDetokenizer
from megatron_dmc.engine.request import CompletionOutput, Request, RequestOutput


def output_of(request: Request, text: str) -> RequestOutput:
    """The request's state so far, with its `visible_text`; its lists are shared, not copied."""
    wants_logprobs = request.params.logprobs is not None
    wants_prompt = request.params.prompt_logprobs is not None
    completion = CompletionOutput(
        index=0,
        text=text,
        num_tokens=len(request.output_token_ids),
        request_token_ids=request.output_token_ids,
        cumulative_logprob=request.cumulative_logprob if wants_logprobs else None,
        request_logprobs=request.logprobs if wants_logprobs else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=request.prompt_logprobs if wants_prompt else None,
        outputs=[completion],
        finished=request.is_finished,
        metrics=request.metrics,
        cr=request.metrics.measured_cr,
        error=request.error,
    )


def visible_text(request: Request, detokenizer: IncrementalDetokenizer | None) -> str:
    """The text so far, without what may yet turn out to begin a stop text."""
    if detokenizer is None:
        return ""
    params = request.params
    if request.is_finished or not params.stop or params.include_stop_str_in_output:
        return detokenizer.text
    held = max(len(stop) for stop in params.stop) - 1
    return detokenizer.text[: max(0, len(detokenizer.text) - held)]
