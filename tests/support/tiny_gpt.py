"""A small float64 model that is called like Megatron's GPTModel, and engines around it.

Dimension letters as in `engine.context`; H hidden size, V vocabulary.
"""

import math
import random
from types import SimpleNamespace

import torch
from torch import nn

from megatron_dmc import SamplingParams
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine
from megatron_dmc.ops import gates, reference
from megatron_dmc.ops.gates import zero_borrowed_channel

L, N, G, D, H, V, MAX_LEN = 2, 4, 2, 8, 16, 40, 64
SCALE = 1 / math.sqrt(D)


class TinyGPT(nn.Module):
    """Called like Megatron's GPTModel; attention is all it has. Float64."""

    def __init__(self, dmc, seed=0):
        super().__init__()
        self.dmc = dmc
        g = torch.Generator().manual_seed(seed)

        def weight(*shape, scale=1.0):
            data = torch.randn(shape, generator=g, dtype=torch.float64)
            return nn.Parameter(scale * data / math.sqrt(shape[-1]), requires_grad=False)

        self.embedding = weight(V, H, scale=4.0)
        self.output = weight(V, H, scale=3.0)
        self.qkv = nn.ParameterList([weight((N + 2 * G) * D, H, scale=2.0) for _ in range(L)])
        self.proj = nn.ParameterList([weight(H, N * D) for _ in range(L)])

    @staticmethod
    def freqs(num_positions):
        half = torch.arange(num_positions)[:, None] * 10.0 ** -torch.arange(D // 2)
        return torch.cat([half, half], dim=-1).double()

    def layer(self, layer_index, x_TH, attend):
        qkv = nn.functional.rms_norm(x_TH, (H,)) @ self.qkv[layer_index].T
        q, k, v = qkv.unflatten(-1, (-1, D)).split([N, G, G], dim=1)
        return x_TH + attend(q, k, v).flatten(1) @ self.proj[layer_index].T

    def forward(
        self, input_ids, position_ids, attention_mask, *, inference_context, output_processor,
        output_processor_context, runtime_gather_output,
    ):  # fmt: skip
        assert input_ids.shape == position_ids.shape and input_ids.shape[0] == 1
        x = self.embedding[input_ids[0]]
        freqs = self.freqs(inference_context.max_sequence_length)
        for i in range(L):

            def attend(q, k, v, i=i):
                return inference_context.attend(i, q, k, v, freqs, softmax_scale=SCALE)

            x = self.layer(i, x, attend)

        def output_layer(hidden, *, weight, runtime_gather_output):
            return hidden @ self.output.T, None

        return output_processor(
            hidden_states=x[:, None],
            output_layer=output_layer,
            output_weight=None,
            context=output_processor_context,
            scale_logits=lambda logits: logits,
        )

    def full_forward(self, token_ids, *, may_merge=True):
        """Logits of every position and the decisions, by the dense formulas of the reference."""
        x = self.embedding[torch.tensor(token_ids)]
        freqs = self.freqs(len(token_ids))
        decisions = []

        def attend(q, k, v):
            q, k, v = q[:, None], k[:, None], v[:, None]
            if self.dmc is None:
                alpha = torch.zeros(len(token_ids), 1, G).double()
                q, k = reference.rotate(q, freqs), reference.rotate(k, freqs)
                # an extra channel takes the place of the borrowed one
                q, k, v = (nn.functional.pad(t, (0, 1)) for t in (q, k, v))
                decisions.append(alpha[:, 0])
                out = reference.training_attention(q, k, v, alpha, softmax_scale=SCALE)
                return out[:, 0, :, :-1]
            offset = self.dmc.alpha_offset
            alpha, log_keep, _ = gates.hard_gate(gates.decision_logit(k, alpha_offset=offset))
            if not may_merge:
                alpha, log_keep = torch.zeros_like(alpha), torch.zeros_like(log_keep)
            decisions.append(alpha[:, 0])
            if self.dmc.policy == "evict":
                q, k = (reference.rotate(zero_borrowed_channel(t), freqs) for t in (q, k))
                return reference.eviction_attention(
                    q, k, v, log_keep, delay=self.dmc.eviction_delay, softmax_scale=SCALE
                )[:, 0]
            omega = gates.importance(q, G, alpha_offset=offset)
            q, k = zero_borrowed_channel(q), zero_borrowed_channel(k)
            merged_k, merged_v = reference.merge(
                k, v, alpha, omega, merge_window=self.dmc.merge_window
            )
            q, k, merged_k = (reference.rotate(t, freqs) for t in (q, k, merged_k))
            return reference.delayed_attention(
                q, k, v, merged_k, merged_v, log_keep,
                merge_delay=self.dmc.merge_delay, softmax_scale=SCALE,
            )[:, 0]  # fmt: skip

        for i in range(L):
            x = self.layer(i, x, attend)
        return x @ self.output.T, torch.stack(decisions)

    def greedy(self, prompt, max_tokens, **kwargs):
        token_ids = list(prompt)
        for _ in range(max_tokens):
            token_ids.append(int(self.full_forward(token_ids, **kwargs)[0][-1].argmax()))
        return token_ids[len(prompt) :]


class Letters:
    """Tokenizer of single bytes spread over tokens: 0 bos, 1 eos, 2 and 3 the halves of 'é'."""

    bos_id, eos_id, vocab_size = 0, 1, V

    def encode(self, text):
        return [4 + ord(c) - ord("a") for c in text]

    def decode(self, ids):
        pieces = {2: b"\xc3", 3: b"\xa9", 0: b"<s>", 1: b"</s>"}
        data = b"".join(pieces.get(i, bytes([ord("a") + i - 4])) for i in ids)
        return data.decode(errors="replace")


def dmc_config(merge_window=0, **settings):
    return DMCConfig(stage="finetune", alpha_offset=0.2, merge_window=merge_window, **settings)


def make_engine(
    dmc, *, tokenizer=None, eos_id=None, model=None, dtype=torch.float64, **settings
):  # fmt: skip
    config = {
        "max_model_len": MAX_LEN, "num_pages": 400, "block_size": 4, "max_num_seqs": 4,
        "max_num_batched_tokens": 32, "poison": True,
    }  # fmt: skip
    description = SimpleNamespace(
        num_layers=L, num_attention_heads=N, num_query_groups=G, kv_channels=D, vocab_size=V,
        max_position_embeddings=MAX_LEN, dmc=dmc,
    )  # fmt: skip
    return LLMEngine(
        model or TinyGPT(dmc), description, tokenizer,
        EngineConfig(**config | settings), dtype=dtype, eos_id=eos_id,
    )  # fmt: skip


def drain(engine, into=None):
    finished = {} if into is None else into
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
    return finished


def check_idle(engine):
    assert engine.stats().num_pages_in_use == 0
    engine.check_integrity()
    assert (engine.context.tables.num_entries_LRG == 0).all()


def make_prompts(count, seed=0, longest=22):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy_params(max_tokens, **kwargs):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)
