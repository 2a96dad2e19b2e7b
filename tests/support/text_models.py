"""Small random models with tokenizers as the large families have them, made on the spot."""

import json

import torch

TEXT = [
    "the cache of the model holds keys and values",
    "pages go and pages come, and a page holds keys",
    "a model merges the keys of many tokens",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start|>", "<|eot|>", "<|eom|>"]


def byte_level_tokenizer(folder, *, adds_bos=True, pad_token=None, chat_template=CHAT):
    """Like Llama 3's: byte-level BPE whose post-processor begins every text with a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=pad_token
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def sentencepiece_tokenizer(folder):
    """Like Llama 2's: sentencepiece with byte fallback, and a configuration that asks for `<s>`."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_llama(folder, vocab_size, seed=0):
    """Save a model to the folder; returns it, of transformers, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.35, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model


def generated(model, token_ids, max_tokens, **options):
    """The tokens that transformers generates greedily."""
    ids = torch.tensor([token_ids])
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": max_tokens} | options
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(token_ids) :].tolist()
