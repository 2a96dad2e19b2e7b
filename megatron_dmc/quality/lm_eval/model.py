"""The engine as an lm-eval model. Importing this module registers it as `megatron-dmc`.

Every request goes to the engine at once, which batches them continuously; log-likelihoods are those
of the prompt, computed over the compressed cache exactly as decoding would compute them.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_dmc.engine import LLM, SamplingParams
from megatron_dmc.errors import DMCError

logger = logging.getLogger(__name__)

_SAMPLING = {f.name for f in fields(SamplingParams)} - {
    "n", "temperature", "stop", "max_tokens",
    "logprobs", "prompt_logprobs", "prompt_logprobs_start",
}  # fmt: skip
"""Generation arguments that go to the engine as they are."""
_NO_EFFECT = {
    "do_sample": (True, False),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "early_stopping": (True, False),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "spaces_between_special_tokens": (True, False),
}
"""Generation arguments that tasks bring, and their values that ask for nothing."""


@register_model("megatron-dmc")
class MegatronDMC(TemplateLM):
    """lm-eval's view of an `LLM`.

    Args:
        pretrained: Hugging Face folder or Megatron checkpoint.
        tokenizer: its folder; default: the checkpoint's.
        llm: a ready engine instead of one that is made here.
        max_gen_toks: most tokens of a completion where the task sets no limit.
        add_bos_token: begin every text with the begin-of-text token; None: as the tokenizer is set up.
        prefix_token_id: what stands before a text without context; default: begin of text, else end.
        trust_remote_code: run the code of a tokenizer that brings its own.
        device: as lm-eval's `--device`.
        batch_size, max_batch_size: accepted and not used: the engine fills its steps by
            `max_num_seqs` and `max_num_batched_tokens`.
        engine: further arguments of `LLM`: `dtype`, `max_model_len`, `enable_dmc`, ...

    Raises:
        DMCError: the model or its tokenizer is unavailable.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        tokenizer: str | None = None,
        llm: LLM | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **engine: Any,
    ):
        super().__init__()
        if pretrained is None:
            raise DMCError(
                "megatron-dmc needs pretrained=PATH: a Hugging Face folder or checkpoint"
            )
        place: Path | None
        place = local_path(tokenizer, with_weights=False) if tokenizer is not None else None
        if place is None:
            place = open_checkpoint(
                pretrained, allow_pickle=engine.get("allow_pickle", False), verify_checkpoint=False,
                trust_remote_code=trust_remote_code, revision=engine.get("revision"),
            )[2]  # fmt: skip
        if place is None:
            raise DMCError(
                f"{pretrained}: no tokenizer next to the checkpoint; give tokenizer=PATH"
            )
        self._plain = load_tokenizer(place, trust_remote_code=trust_remote_code)
        # lm-eval's own functions look for chat templates in it
        self.tokenizer: Any | None = None
        if isinstance(self._plain, HuggingFaceTokenizer):
            self.tokenizer = self._plain.inner
        if llm is None:
            llm = LLM(
                pretrained,
                self._plain,
                device=device,
                trust_remote_code=trust_remote_code,
                **engine,
            )
        self.llm, self.pretrained = llm, str(pretrained)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._place = place

    # Text and tokens.

    @property
    def max_length(self) -> int:
        """Most tokens that a scored token may be preceded by. The engine holds the scored token too and
        keeps room for one more: two less than `max_model_len`."""
        return self.llm.engine.max_model_len - 2

    @property
    def eot_token_id(self) -> int:
        eos = self._plain.eos_id
        if eos is None:
            raise DMCError(
                f"{self._place}: the tokenizer has no end-of-text token; lm-eval needs it"
            )
        return eos

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return int(self._prefix_token_id)
        return self.eot_token_id if self._plain.bos_id is None else self._plain.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with the special tokens that the tokenizer is configured to add, by default. A text
        that already begins with the prefix token gets none, as with lm-eval's `hf`."""
        add = add_special_tokens
        if add is None:
            prefix = self._plain.decode([self.prefix_token_id], skip_special_tokens=False)
            add = not has_bos_prefix(string, prefix)
        if not add or self.add_bos_token is False:
            return self._plain.encode(string)
        token_ids = self._plain.encode(string, add_special_tokens=True)
        bos = self._plain.bos_id
        if self.add_bos_token and bos is not None and token_ids[:1] != [bos]:
            token_ids = [bos, *token_ids]  # the tokenizer is not set up to add it
        return token_ids

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches: its folder and a hash of vocabulary and template."""
        if self.tokenizer is None:
            content = self._place.read_bytes() if self._place.is_file() else b""
            for file in sorted(self._place.glob("*.model")) if self._place.is_dir() else []:
                content += file.read_bytes()
        else:
            vocab = sorted(self.tokenizer.get_vocab().items())
            content = json.dumps([vocab, self.tokenizer.chat_template]).encode()
        return f"{self._place.name}-{hashlib.sha256(content).hexdigest()[:12]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model reads it.

        Raises:
            DMCError: the tokenizer has no chat template, or it refuses the messages.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise DMCError(
                f"{self._place}: the tokenizer has no chat template; leave --apply-chat-template out"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
        except Exception as e:  # templates raise what they like
            raise DMCError(f"{self._place}: the chat template refuses the messages: {e}") from e
        return text

    # Scores.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would give it.
        What is longer than `max_length + 1` tokens loses its beginning, as with lm-eval's `hf`."""
        prompts, params = [], []
        for _, context, continuation in requests:
            token_ids = (context + continuation)[-(self.max_length + 1) :]
            start = len(token_ids) - len(continuation)
            if start < 1:
                raise DMCError(
                    f"a continuation of {len(continuation)} tokens does not fit the context of "
                    f"{self.max_length}; raise max_model_len"
                )
            prompts.append({"prompt_token_ids": token_ids})
            params.append(
                SamplingParams(
                    temperature=0, max_tokens=1, prompt_logprobs=1, prompt_logprobs_start=start
                )
            )
        results = []
        # longest first: pages run short at once or never
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]["prompt_token_ids"]))
        outputs = self.llm.generate(
            [prompts[i] for i in order], [params[i] for i in order], use_tqdm=not disable_tqdm
        )
        by_request = dict(zip(order, outputs, strict=True))
        for i, (text, _, continuation) in enumerate(requests):
            rows = by_request[i].prompt_logprobs
            assert rows is not None
            scored = rows[len(rows) - len(continuation) :]
            entries = [row[t] for row, t in zip(scored, continuation, strict=True) if row]
            assert len(entries) == len(continuation)
            answer = (sum(e.logprob for e in entries), all(e.rank == 1 for e in entries))
            results.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens, each token scored once. Each
        window starts with an empty cache."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pieces = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, context, continuation) for context, continuation in pieces]
            counts.append(len(pieces))
        scores = [s for s, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        totals = []
        for request, end, count in zip(requests, np.cumsum(counts), counts, strict=True):
            totals.append(float(sum(scores[end - count : end])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop text, without it. A prompt that leaves no room loses its beginning;
        where the task asks for more tokens than the context has, it keeps what fits of the prompt and
        generates the rest."""
        prompts, params = [], []
        num_cut = num_shortened = 0
        longest = self.llm.engine.max_model_len
        for context, arguments in (request.args for request in requests):
            settings = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
            asked = int(settings.pop("max_gen_toks"))
            whole = self.tok_encode(context) or [self.prefix_token_id]
            token_ids, max_tokens = maybe_truncate(
                whole, max_gen_toks=asked, max_model_len=longest, shrink_gen_toks=asked >= longest,
                verbose=False,
            )  # fmt: skip
            num_cut += len(token_ids) < len(whole)
            num_shortened += max_tokens < asked
            prompts.append({"prompt_token_ids": token_ids})
            params.append(_sampling_params(settings, max_tokens))
        if num_cut or num_shortened:
            logger.warning(
                "context of %d tokens: %d of %d prompts lost their beginning, and %d completions can be "
                "shorter than the task allows; raise max_model_len or lower max_gen_toks",
                longest, num_cut, len(prompts), num_shortened,
            )  # fmt: skip
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            texts.append(output.outputs[0].text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    # Figures.

    def get_model_info(self) -> dict[str, Any]:
        """Entries that lm-eval adds to the results: the model, and the CR of everything that this engine has
        computed: of the cache, raw tokens of a delay included, and by the decisions."""
        engine, stats = self.llm.engine, self.llm.stats()
        weights = list(engine.runner.model.parameters())
        return {
            "model_num_parameters": sum(p.numel() for p in weights),
            "model_dtype": str(weights[0].dtype),
            "max_model_len": engine.max_model_len,
            "cache_policy": engine.config.cache_policy,
            "cache_budget": engine.config.cache_budget,
            "measured_cr": stats.measured_cr,
            "decided_cr": stats.decided_cr,
            "measured_cr_per_head": stats.measured_cr_LG,
            "num_cached_tokens": stats.seq_tokens,
            "num_cache_entries": stats.num_entries,
            "peak_cache_pages": stats.peak_pages_in_use,
        }


def _sampling_params(settings: dict[str, Any], max_tokens: int) -> SamplingParams:
    """From a task's generation arguments.

    Raises:
        DMCError: one that the engine does not have.
    """
    sampled = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    for name, value in settings.items():
        known = name in ("until", "temperature", *_SAMPLING) or value is None
        if not known and value not in _NO_EFFECT.get(name, ()):
            raise DMCError(
                f"generation argument {name}={value!r}: the engine does not support it; remove it from "
                "the task's generation_kwargs or --gen-kwargs"
            )
    return SamplingParams(
        temperature=settings.get("temperature") or 0.0,
        stop=[text for text in settings.get("until", []) if text],
        max_tokens=max_tokens,
        **sampled,
    )
