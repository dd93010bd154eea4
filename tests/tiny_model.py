"""A Llama of two layers with a ChatML tokenizer, built by the tests: real files, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY_SIZE = 512
MAX_POSITIONS = 512

_CORPUS = """
You are a helpful assistant. The user asks a question and the assistant answers it.
What is the capital of France? The capital of France is Paris. How many days are there in a week?
There are seven days in a week. Please write a short story about a river, a bridge and a small house.
Once upon a time there was a little house by the river, and every morning the children crossed the bridge.
system user assistant tool content role question answer one two three four five six seven eight nine ten
Une petite maison près de la rivière. Ein kleines Haus am Fluss. Una casa pequeña junto al río.
0 1 2 3 4 5 6 7 8 9 10 100 1000 + - * / = ( ) [ ] { } , . : ; ! ? the of and to in is it that was for on
"""


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE with all 256 bytes in its alphabet, so that any UTF-8 text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        # Merges that occur once are kept, so that the small corpus fills the vocabulary.
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    return tokenizer


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """The tokenizer of the tiny models, for transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_tiny_model(path: Path, seed: int = 0, chat_template: str | None = CHATML) -> Path:
    """`path` as a Hugging Face model directory: about 0.1 M random bf16 weights, and a tokenizer.

    The same seed gives the same bytes. With `chat_template=None` the tokenizer has no template.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(chat_template)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny model, shared by the whole run: never change it."""
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama")
