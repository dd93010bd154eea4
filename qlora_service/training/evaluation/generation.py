"""What base and adapter answer, side by side, and how near that is to what the data set answers.

Decoding is greedy: of the settings that come with a model only its stop tokens are used, so that two answers differ by
the adapter alone and are the same in every attempt.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_service.errors import InvalidSpec
from qlora_service.specs import Evaluation
from qlora_service.training.network.micro_batch import (
    PER_DOCUMENT,
    LabelledRow,
    PreferencePair,
    TokenRow,
    TrainingExample,
)
from qlora_service.training.network.network import Network

SHOWN_CHARS = 2000
"""Of a row's question the end is shown: what is asked stands there."""
ROUGE = ("rouge1", "rouge2", "rougeL")
KANA_AND_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{KANA_AND_IDEOGRAPHS}]|[^\W_{KANA_AND_IDEOGRAPHS}]+")
"""A run of letters and digits; Chinese and Japanese have no spaces between words, so there each sign is one."""


@dataclass(frozen=True)
class AnswerPair:
    """What base and adapter answer to the same prompt."""

    base: str
    adapter: str
    base_s: float
    adapter_s: float
    max_new_tokens: int
    """Longest answer there was room for: the one asked for, or what the prompt leaves of the model's positions"""


@dataclass(frozen=True)
class Scores:
    """How near answers are to their references; means over the answers, but for BLEU."""

    exact_match: float
    """Share that is the reference but for white space around it"""
    bleu: float
    """0 to 100, over all answers"""
    rouge1: float
    """F-measures, 0 to 1"""
    rouge2: float
    rougeL: float


@dataclass(frozen=True)
class AskedRow:
    """A row's last learned answer, and everything before it."""

    line: int
    prompt: list[int]
    answer: list[int]


@torch.no_grad()
def compare_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_answer: Callable[[], None],
    *,
    also_stop: Collection[int] = (),
) -> list[AnswerPair]:
    """Answers to each prompt, without white space around them; `also_stop` are stop tokens besides the model's own.

    A prompt that fills the model's positions has no answer: "". `on_answer` is called after every answer of base and
    adapter and may raise to stop. The model is left as it was.
    """
    pairs = []
    with _generating(model, sorted(stop_ids(model, tokenizer) | set(also_stop))):
        for prompt in prompts:
            limit = min(max_new_tokens, _room(model, prompt))
            with model.disable_adapter():
                base, base_s = _answer(model.get_base_model(), tokenizer, prompt, limit)
            on_answer()
            adapter, adapter_s = _answer(model, tokenizer, prompt, limit)
            on_answer()
            pairs.append(AnswerPair(base, adapter, base_s, adapter_s, limit))
    return pairs


def evaluate_generation(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[TrainingExample],
    spec: Evaluation,
    on_answer: Callable[[], None],
) -> dict[str, Any]:
    """A report that JSON can hold: scores (None without rows), rows, questions, and the seconds that answers took.

    The rows are the first `spec.generate_rows` held-out ones with a question. Where a prompt left no room for
    `spec.max_new_tokens`, the entry says for how many it did.

    Raises:
        InvalidSpec: the chat template refuses a question.
    """
    model = network.model
    stops = stop_ids(model, tokenizer)
    asked = (_asked_row(example, tokenizer, stops) for example in held_out)
    rows = list(islice((row for row in asked if row is not None), spec.generate_rows))
    pairs = compare_answers(
        model,
        tokenizer,
        [row.prompt for row in rows] + [question_ids(tokenizer, question) for question in spec.questions],
        spec.max_new_tokens,
        on_answer,
        also_stop=_row_endings(held_out, tokenizer),
    )
    of_rows, of_questions = pairs[: len(rows)], pairs[len(rows) :]
    references = [_text(tokenizer, row.answer) for row in rows]
    base = score([(pair.base, reference) for pair, reference in zip(of_rows, references, strict=True)])
    adapter = score([(pair.adapter, reference) for pair, reference in zip(of_rows, references, strict=True)])
    scores = None if base is None or adapter is None else {"base": asdict(base), "adapter": asdict(adapter)}
    return {
        "scores": scores,
        "rows": [
            {"line": row.line, "question": _text(tokenizer, row.prompt)[-SHOWN_CHARS:], "reference": reference}
            | _shown(pair, spec)
            for row, reference, pair in zip(rows, references, of_rows, strict=True)
        ],
        "questions": [
            {"question": question} | _shown(pair, spec)
            for question, pair in zip(spec.questions, of_questions, strict=True)
        ],
        "seconds": {"base": sum(pair.base_s for pair in pairs), "adapter": sum(pair.adapter_s for pair in pairs)},
    }


def score(pairs: Sequence[tuple[str, str]]) -> Scores | None:
    """Scores of (answer, reference) pairs; None where there are none.

    BLEU is sacrebleu's with its default tokenizer (13a), to which a run of Chinese or Japanese is one word; n-grams
    longer than every answer are left out, where they would make it 0 for perfect answers of one word. ROUGE is
    rouge-score's without stemming. Its own words are runs of a-z and 0-9, which makes every other script 0: here words
    are runs of any letters and digits, and each Chinese or Japanese sign is one; on ASCII text that is the same.
    """
    if not pairs:
        return None
    # Where they are needed: with nltk they would be a twentieth of every trainer's start.
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    answers, references = ([text.strip() for text in side] for side in zip(*pairs, strict=True))
    scorer = RougeScorer(list(ROUGE), tokenizer=_Words())
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    # force: it would warn of answers that look tokenized already.
    bleu = BLEU(effective_order=True, force=True).corpus_score(answers, [references])
    return Scores(
        exact_match=sum(map(str.__eq__, answers, references)) / len(pairs),
        bleu=bleu.score,
        **{kind: sum(each[kind].fmeasure for each in rouge) / len(pairs) for kind in ROUGE},
    )


class _Words:
    """The tokenizer that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def question_and_answer(row: TokenRow, stops: Collection[int] = ()) -> tuple[list[int], list[int]] | None:
    """The ids before the row's last trained span, and those of the span but for the stop tokens at its end.

    None where nothing precedes it.
    """
    trained = list(row.trained)
    end = len(trained) - trained[::-1].index(True)
    start = end
    while start > 0 and trained[start - 1]:
        start -= 1
    if start == 0:
        return None
    while end > start and row.input_ids[end - 1] in stops:
        end -= 1
    return list(row.input_ids[:start]), list(row.input_ids[start:end])


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The prompt of a question asked by a user: by the chat template, or the plain text where there is none.

    Raises:
        InvalidSpec: the chat template refuses it.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(question)["input_ids"])
    conversation = [{"role": "user", "content": question}]
    try:
        rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise InvalidSpec(
            f"the base model's chat template refuses the question {question[:100]!r}: {error}",
            location="/evaluation/questions",
        ) from error
    return list(rendered["input_ids"])


def stop_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends an answer: the tokenizer's end of text, and what the model's generation settings name."""
    listed = model.get_base_model().generation_config.eos_token_id
    named = listed if isinstance(listed, list) else [listed]
    return {token_id for token_id in [tokenizer.eos_token_id, *named] if token_id is not None}


def _asked_row(example: TrainingExample, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> AskedRow | None:
    """None for an answer that is not wanted, and for text, where nothing or only a start token comes first."""
    match example:
        case PreferencePair():
            row = example.chosen
        case LabelledRow():
            row = example.answer
            if not example.desirable:
                return None
        case _:
            row = example
    parts = question_and_answer(row, stops)
    if parts is None or not _text(tokenizer, parts[0]):
        return None
    return AskedRow(row.line, *parts)


def _row_endings(examples: Sequence[TrainingExample], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens that answers of the rows end with: a template may end turns with one that is no end of text."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = {document.input_ids[-1] for example in examples for document in example.documents if document.trained[-1]}
    return special & last


@contextmanager
def _generating(model: PeftModel, stops: list[int]) -> Iterator[None]:
    """The model as it has to be for greedy generation with a cache; afterwards as it was."""
    base = model.get_base_model()
    was_training, settings = model.training, base.generation_config
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Attention per document knows no mask: a prefix would be cut off, and windows of attention ignored.
    per_document = base.config._attn_implementation == PER_DOCUMENT
    model.eval()
    base.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0
    )
    if per_document:
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    try:
        with warnings.catch_warnings():
            # transformers gives them along; of a prompt method PEFT leaves them to the cache's length.
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            yield
    finally:
        if per_document:
            base.set_attn_implementation(PER_DOCUMENT)
        base.generation_config = settings
        model.train(was_training)
        # Switching an adapter off and on lets PEFT choose anew what is learned.
        model.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], limit: int) -> tuple[str, float]:
    """The answer of at most `limit` tokens, and the seconds it took."""
    if limit == 0:
        return "", 0.0
    started = time.perf_counter()
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit)
    return _text(tokenizer, output[0, len(prompt) :]), time.perf_counter() - started


def _room(model: PeftModel, prompt: Sequence[int]) -> int:
    """Tokens of an answer that the model has positions for; virtual tokens take some."""
    config, adapter = model.get_base_model().config.get_text_config(), model.active_peft_config
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return max(0, positions - len(prompt) - (adapter.num_virtual_tokens if adapter.is_prompt_learning else 0))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | torch.Tensor) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def _shown(pair: AnswerPair, spec: Evaluation) -> dict[str, Any]:
    answers: dict[str, Any] = {"base": pair.base, "adapter": pair.adapter}
    return answers if pair.max_new_tokens == spec.max_new_tokens else answers | {"max_new_tokens": pair.max_new_tokens}
