"""Model directories of the template families in `trl/chat_templates`, each with a small tokenizer of its own."""

# ruff: noqa: RUF001 - full-width characters are meant

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.benchmarks._rendering.conversations import conversations

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_TRAINING = "_training"
# The tokens of a template: in bars, and those below.
_IN_BARS = re.compile(r"<\|[a-zA-Z_\"][\w\"]*\|?>|<[a-z_]+\|>|<｜[^<>｜]+｜>")
_SPECIAL = ["<bos>", "<eos>", "<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<sop>", "[gMASK]"]
_SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_utterance>", "<image>"]
_SPECIAL += ["<BOS_TOKEN>", "<PAD>"]
# Real models have them as added tokens that are not special.
_NORMAL = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_NORMAL += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tools>", "</tools>"]


@dataclass(frozen=True)
class Tokens:
    """Special tokens of a family. `stops`: the tokens that end generation, beyond `eos`."""

    eos: str
    bos: str | None = None
    pad: str = "<|endoftext|>"
    stops: tuple[str, ...] = ()


_IM_END = Tokens("<|im_end|>", stops=("<|endoftext|>",))
_DEEPSEEK = Tokens("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
# By the start of the family's name; the longest start counts.
TOKENS = {
    "cohere": Tokens("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<PAD>"),
    "deepseek": _DEEPSEEK,
    "diffusion_gemma": Tokens("<eos>", "<bos>", "<pad>", ("<turn|>", "<|tool_response>")),
    "gemma": Tokens("<eos>", "<bos>", "<pad>", ("<end_of_turn>",)),
    "gemma4": Tokens("<eos>", "<bos>", "<pad>", ("<turn|>", "<|tool_response>")),
    "glm4moe": Tokens("<|endoftext|>", stops=("<|user|>", "<|observation|>")),
    "gptoss": Tokens("<|return|>", "<|startoftext|>", stops=("<|endoftext|>", "<|call|>")),
    "idefics3": Tokens("<|end_of_text|>", "<|begin_of_text|>", "<|end_of_text|>", ("<end_of_utterance>",)),
    "lfm2": Tokens("<|im_end|>", "<|startoftext|>", "<|pad|>"),
    "llama3": Tokens("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>"),
    "llama3_1": Tokens("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>")),
    "llama3_2": Tokens("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>")),
    "llava_next": Tokens("</s>", "<s>", "<pad>"),
    "muse_glimmer": Tokens("<|eot|>", "<|begin_of_text|>"),
    "nemotron": Tokens("<|im_end|>", "<s>", "<|im_end|>"),
    "phi3": Tokens("<|endoftext|>", "<s>", stops=("<|end|>",)),
    "qwen": _IM_END,
    "smolvlm": Tokens("<end_of_utterance>", "<|im_start|>", "<|im_end|>"),
}


def names() -> list[str]:
    """The families: every template that is not a training template."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith(_TRAINING))


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def training_template(name: str) -> str | None:
    """TRL's training template of the family, or None without one."""
    path = TEMPLATES / f"{name}{_TRAINING}.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def tokens_of(name: str) -> Tokens:
    return TOKENS[max((start for start in TOKENS if name.startswith(start)), key=len)]


def build_model(name: str, path: Path, trained: Tokenizer) -> Path:
    """`path` as a model directory of the family, without weights; `trained` comes from `train_tokenizer`."""
    tokens, text = tokens_of(name), template(name)
    tokenizer = Tokenizer.from_str(trained.to_str())
    special = [tokens.eos, tokens.pad, *([tokens.bos] if tokens.bos else []), *tokens.stops]
    special += [*_IN_BARS.findall(text), *(token for token in _SPECIAL if token in text)]
    normal = [token for token in _NORMAL if token in text]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in normal])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(special)])
    if tokens.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens.bos}:0 $A:0", special_tokens=[(tokens.bos, tokenizer.token_to_id(tokens.bos))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens.bos,
        eos_token=tokens.eos,
        pad_token=tokens.pad,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)
    (path / "chat_template.jinja").write_text(text, encoding="utf-8")
    eos_ids = [tokenizer.token_to_id(token) for token in (tokens.eos, *tokens.stops)]
    bos_id = None if tokens.bos is None else tokenizer.token_to_id(tokens.bos)
    config = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": bos_id}
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": eos_ids[0]}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    return path


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE without special tokens. Runs of line breaks and spaces are tokens, as in real vocabularies."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [json.dumps(row, ensure_ascii=False, indent=2) for row in conversations().values()]
    tokenizer.train_from_iterator([*corpus, *("a\n\nb\n c\n\n\nd  e" for _ in range(10))], trainer)
    return tokenizer
