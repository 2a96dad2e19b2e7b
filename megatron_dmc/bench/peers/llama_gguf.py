"""A Llama of the Hugging Face layout as GGUF, bit for bit: what llama.cpp needs to decode token ids, and no vocabulary."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(folder: Path, file: Path) -> None:
    """Write the folder's weights; matrices stay bfloat16, norms become float32.

    Raises:
        ValueError: it holds something else than a Llama in bfloat16.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if (
        config["model_type"] != "llama"
        or config.get("rope_scaling")
        or rope.get("rope_type", "default") != "default"
    ):
        raise ValueError(
            f"{folder} is a {config['model_type']}: this writes GGUF of Llama models without "
            "scaled RoPE; give --gguf FILE with the same weights"
        )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base((rope or config).get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in _tensors(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = _interleaved(bits, heads if "q_proj" in name else kv_heads)
        if bits.ndim == 1:
            writer.add_tensor(_renamed(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(
                _renamed(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names, and bfloat16 as 16-bit integers."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        begin = 8 + int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if tensor["dtype"] != "BF16":
                raise ValueError(
                    f"{file}: {name} is {tensor['dtype']}, not BF16; give --gguf FILE with the same weights"
                )
            first, last = tensor["data_offsets"]
            assert last - first == 2 * math.prod(tensor["shape"])
            bits = np.frombuffer(data[begin + first : begin + last].tobytes(), np.uint16)
            yield name, bits.reshape(tensor["shape"])


def _interleaved(bits: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection whose RoPE turns neighbours, from one that turns halves."""
    rows, columns = bits.shape
    halves = bits.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return OUTSIDE[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"
