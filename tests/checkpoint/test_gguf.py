"""GGUF files that the test writes with llama.cpp's own library, against transformers' dequantisation."""

import json

import pytest
import torch
from text_models import CHAT, SPECIAL, TEXT, byte_level_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert, detect_format
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.cli.main import main
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

gguf = pytest.importorskip("gguf")

SIZES = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0,
    eos_token_id=1, rms_norm_eps=1e-5,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_theta=1e5, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
TYPES = ("F32", "F16", "Q8_0", "Q4_1")


def random_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.float()


def write_gguf(
    file, family, model, tokenizer, types=TYPES, *, pre="smollm", extra=(), leave_out=()
):
    """As llama.cpp's converter does: names, reordered rows of Llama's queries and keys, tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    control = int(gguf.TokenType.CONTROL)
    writer.add_token_types(
        [control if t in SPECIAL else int(gguf.TokenType.NORMAL) for t in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    for name, value in extra:
        writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for i, (name, weight) in enumerate(model.state_dict().items()):
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = weight.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            half = config.head_dim // 2
            values = (
                values.reshape(-1, 2, half, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            )
        kind = gguf.GGMLQuantizationType[types[i % len(types)] if values.ndim > 1 else "F32"]
        stored = gguf.quantize(values, kind)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), stored, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=False)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tokenizer, tmp_path_factory):
    """(family, GGUF file, folder that it was converted to)."""
    folder = tmp_path_factory.mktemp(request.param)
    file = write_gguf(folder / "model.gguf", request.param, random_model(request.param), tokenizer)
    assert detect_format(file) == detect_format(folder) == "gguf"
    converted = tmp_path_factory.mktemp("converted") / "hf"
    assert main(["convert", "--from", "gguf", "--to", "hf", str(folder), str(converted)]) == 0
    return request.param, file, converted


def dequantised(family, file, dtype):
    """The model as transformers reads the file."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=CONFIGS[family], dtype=dtype
    )


def test_weights_are_those_that_transformers_dequantises(case):
    family, file, folder = case
    expected = dequantised(family, file, torch.bfloat16).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == family
    found = model.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


def test_engine_and_megatron_read_the_result(case, tmp_path):
    family, file, folder = case
    ids = torch.tensor([[5, 80, 200, 7, 42, 9]])
    convert("hf", "megatron", folder, tmp_path / "megatron")
    rounded = AutoModelForCausalLM.from_pretrained(folder).float()
    reference = dequantised(family, file, torch.float32)
    for path, model in ((folder, rounded), (tmp_path / "megatron", rounded), (file, reference)):
        loaded = load_model(path, dtype=torch.float32)
        with torch.no_grad():
            expected = model(ids).logits
        logits = full_forward(loaded.model, ids)[..., : expected.shape[-1]]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    llm = LLM(str(file), dtype="float32")
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    new = llm.generate({"prompt_token_ids": ids[0].tolist()}, greedy, use_tqdm=False)[0]
    with torch.no_grad():
        wanted = reference.generate(
            ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert new.outputs[0].token_ids == wanted[0, ids.shape[1] :].tolist()


def test_tokenizer_and_chat_template(case, tokenizer):
    _, _, folder = case
    found = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXT, " 12 pages,  345\n\n", "keys<|eot|> go"]:
        ids = found.encode(text)
        assert found.decode(ids) == text
    assert found.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
    assert found.tokenize("go  27") == [*found.tokenize("go  "), "2", "7"], "digits stand alone"
    messages = [{"role": "user", "content": "keys"}]
    assert found.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert (found.bos_token, found.eos_token) == (SPECIAL[0], SPECIAL[1])


def test_llama3_scaling_of_rope_is_found_in_its_factors(tokenizer, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(**SIZES | {"hidden_size": 128}, rope_parameters=scaling)
    model = AutoModelForCausalLM.from_config(config).float()
    plain = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    assert factors.min() < 1.001 and 7.9 < factors.max(), "some frequencies are scaled"
    model.register_buffer("rope_freqs", factors)

    class Names:
        def get_name(self, name, try_suffixes):
            return "rope_freqs.weight" if name == "rope_freqs" else own.get_name(name, try_suffixes)

    own = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", lambda *_: Names())
        file = write_gguf(
            tmp_path / "model.gguf", "llama", model, tokenizer, ("F16",), pre="llama-bpe"
        )
    description = convert("gguf", "hf", file, tmp_path / "hf")
    assert description.rope_scaling_factor == 8.0 and description.dtype == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("keys")[0] == 0, "begins with BOS"


def refuse(file, kind, words, **options):
    with pytest.raises(kind) as caught:
        convert("gguf", "hf", file, file.parent / "out", **options)
    message = str(caught.value)
    assert file.name in message and all(word in message for word in words), message
    assert "\n" not in message.strip() and not (file.parent / "out").exists()


def test_wrong_files_are_refused_in_one_line(tokenizer, tmp_path):
    model = random_model("llama")

    def written(name, **options):
        (tmp_path / name).mkdir()
        return write_gguf(
            tmp_path / name / "model.gguf", "llama", model, tokenizer, ("Q8_0",), **options
        )

    whole = written("whole").read_bytes()
    for name, content in {
        "empty": b"", "text": b"not a model" * 99, "cut": whole[:-4000], "head": whole[:3000],
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        file = tmp_path / name / "model.gguf"
        file.write_bytes(content)
        refuse(file, CheckpointError, ["truncated or not a GGUF file", "copy it again"])
    refuse(written("experts", extra=[("llama.expert_count", 8)]), UnsupportedConfig, ["8 experts"])
    refuse(written("parts", extra=[("split.count", 3)]), CheckpointError, ["one of 3 parts"])
    refuse(
        written("partial", extra=[("llama.rope.dimension_count", 8)]),
        UnsupportedConfig, ["rope.dimension_count is 8", "16"],
    )  # fmt: skip
    refuse(written("pre", pre="unheard-of"), UnsupportedConfig, ["unheard-of", "--tokenizer"])
    refuse(
        written("missing", leave_out=["model.layers.1.mlp.up_proj.weight"]),
        CheckpointError, ["missing tensors: blk.1.ffn_up.weight"],
    )  # fmt: skip
    two = written("two")
    (two.parent / "other.gguf").write_bytes(two.read_bytes())
    with pytest.raises(CheckpointError, match="2 GGUF files .*name one"):
        detect_format(two.parent)


def test_a_tokenizer_may_come_from_elsewhere(tokenizer, tmp_path):
    file = write_gguf(
        tmp_path / "m.gguf", "llama", random_model("llama"), tokenizer, pre="unheard-of"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(None, "hf", file, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("keys") == tokenizer.encode("keys")
