"""Generated answers of base and adapter, and their scores against the dataset's answers.

Decoding is greedy, and a model's own generation settings are not used, so two answers differ by the adapter alone, and
every attempt generates the same ones.
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
    LabeledRow,
    PreferencePair,
    TokenRow,
    TrainingExample,
)
from qlora_service.training.network.network import Network

QUESTION_CHARS = 2000
"""Characters of a row's prompt in the report: its last ones, where the question is"""
ROUGE = ("rouge1", "rouge2", "rougeL")
KANA_AND_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{KANA_AND_IDEOGRAPHS}]|[^\W_{KANA_AND_IDEOGRAPHS}]+")
"""A run of letters and digits; of Chinese and Japanese, which have no spaces between words, a single character"""


@dataclass(frozen=True)
class AnswerPair:
    """Answers of base and adapter to the same prompt."""

    base: str
    adapter: str
    base_s: float
    adapter_s: float
    max_new_tokens: int
    """Upper bound of the answer's tokens: the requested one, or fewer if the prompt leaves fewer positions"""


@dataclass(frozen=True)
class Scores:
    """Similarity of answers to their references: means over the answers, except BLEU."""

    exact_match: float
    """Share of answers that equal the reference, ignoring white space around both"""
    bleu: float
    """0 to 100, over all answers"""
    rouge1: float
    """F-measure, 0 to 1, as are the next two"""
    rouge2: float
    rougeL: float


@dataclass(frozen=True)
class ReferenceRow:
    """Token ids of a row's last trained answer, and of everything before it."""

    line: int
    prompt: list[int]
    answer: list[int]


@torch.no_grad()
def compare_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    on_answer: Callable[[], None],
) -> list[AnswerPair]:
    """Answers to each prompt, up to the first of the stop tokens, without white space around them.

    The answer to a prompt that fills the model's positions is "". `on_answer` is called after every answer of base and
    adapter, and may raise to stop. The model is left as it was.
    """
    pairs = []
    with _greedy_generation(model, sorted(stop_ids)):
        for prompt in prompts:
            limit = min(max_new_tokens, _free_positions(model, prompt))
            with model.disable_adapter():
                base, base_s = _answer(model.get_base_model(), tokenizer, prompt, limit, stop_ids)
            on_answer()
            adapter, adapter_s = _answer(model, tokenizer, prompt, limit, stop_ids)
            on_answer()
            pairs.append(AnswerPair(base, adapter, base_s, adapter_s, limit))
    return pairs


def evaluate_generation(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[TrainingExample],
    spec: Evaluation,
    stop_ids: Collection[int],
    on_answer: Callable[[], None],
) -> dict[str, Any]:
    """A report of JSON values: scores (None without rows), rows, questions, and the seconds of all answers.

    The rows are the first `spec.generate_rows` held-out rows with a question. An entry has `max_new_tokens` if its
    prompt left room for fewer tokens than `spec.max_new_tokens`.

    Raises:
        InvalidSpec: the chat template refuses a question.
    """
    reference_rows = (_reference_row(example, tokenizer, stop_ids) for example in held_out)
    rows = list(islice((row for row in reference_rows if row is not None), spec.generate_rows))
    pairs = compare_answers(
        network.model,
        tokenizer,
        [row.prompt for row in rows] + [question_ids(tokenizer, question) for question in spec.questions],
        spec.max_new_tokens,
        stop_ids,
        on_answer,
    )
    row_pairs, question_pairs = pairs[: len(rows)], pairs[len(rows) :]
    references = [_text(tokenizer, row.answer) for row in rows]
    base = score([(pair.base, reference) for pair, reference in zip(row_pairs, references, strict=True)])
    adapter = score([(pair.adapter, reference) for pair, reference in zip(row_pairs, references, strict=True)])
    scores = None if base is None or adapter is None else {"base": asdict(base), "adapter": asdict(adapter)}
    return {
        "scores": scores,
        "rows": [
            {"line": row.line, "question": _text(tokenizer, row.prompt)[-QUESTION_CHARS:], "reference": reference}
            | _report_entry(pair, spec)
            for row, reference, pair in zip(rows, references, row_pairs, strict=True)
        ],
        "questions": [
            {"question": question} | _report_entry(pair, spec)
            for question, pair in zip(spec.questions, question_pairs, strict=True)
        ],
        "seconds": {"base": sum(pair.base_s for pair in pairs), "adapter": sum(pair.adapter_s for pair in pairs)},
    }


def score(pairs: Sequence[tuple[str, str]]) -> Scores | None:
    """Scores of (answer, reference) pairs; None without pairs.

    BLEU is sacrebleu's with its default tokenizer (13a), for which a run of Chinese or Japanese is one word. N-grams
    longer than every answer are left out, because they would make it 0 for perfect answers of one word.

    ROUGE is rouge-score's without stemming. Its own words are runs of a-z and 0-9, which scores every other script 0.
    Here words are runs of any letters and digits, and each Chinese or Japanese character is a word; on ASCII text the
    scores are the same.
    """
    if not pairs:
        return None
    # Imported here, because with nltk they take a twentieth of every trainer's start.
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    answers, references = ([text.strip() for text in side] for side in zip(*pairs, strict=True))
    scorer = RougeScorer(list(ROUGE), tokenizer=_WordTokenizer())
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    # force: no warning about answers that look tokenized already.
    bleu = BLEU(effective_order=True, force=True).corpus_score(answers, [references])
    return Scores(
        exact_match=sum(map(str.__eq__, answers, references)) / len(pairs),
        bleu=bleu.score,
        **{kind: sum(each[kind].fmeasure for each in rouge) / len(pairs) for kind in ROUGE},
    )


def prompt_and_answer(row: TokenRow, stops: Collection[int] = ()) -> tuple[list[int], list[int]] | None:
    """The ids before the row's last trained span, and the ids of that span without the stop tokens at its end.

    None if nothing precedes the span.
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
    """The prompt of a user's question: rendered by the chat template, or plain text without one.

    Raises:
        InvalidSpec: the chat template refuses the question.
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


class _WordTokenizer:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def _reference_row(
    example: TrainingExample, tokenizer: PreTrainedTokenizerBase, stops: Collection[int]
) -> ReferenceRow | None:
    """None for an undesirable answer, and for plain text, which has no prompt or only a start token."""
    match example:
        case PreferencePair():
            row = example.chosen
        case LabeledRow():
            row = example.answer
            if not example.desirable:
                return None
        case _:
            row = example
    parts = prompt_and_answer(row, stops)
    if parts is None or not _text(tokenizer, parts[0]):
        return None
    return ReferenceRow(row.line, *parts)


@contextmanager
def _greedy_generation(model: PeftModel, stops: list[int]) -> Iterator[None]:
    """Inside, the model is set up for greedy generation with a cache; on exit its former settings are restored."""
    base = model.get_base_model()
    was_training, settings = model.training, base.generation_config
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Attention per document takes no mask: it would cut a prefix off, and ignore attention windows.
    per_document = base.config._attn_implementation == PER_DOCUMENT
    model.eval()
    base.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0
    )
    if per_document:
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    try:
        with warnings.catch_warnings():
            # transformers passes them; for a prompt method PEFT derives them from the cache's length instead.
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            yield
    finally:
        if per_document:
            base.set_attn_implementation(PER_DOCUMENT)
        base.generation_config = settings
        model.train(was_training)
        # PEFT resets which parameters are trainable when an adapter is disabled and enabled.
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], limit: int, stop_ids: Collection[int]
) -> tuple[str, float]:
    """The answer of at most `limit` tokens, without a stop token, and the seconds that it took."""
    if limit == 0:
        return "", 0.0
    started = time.perf_counter()
    ids = torch.tensor([list(prompt)], device=model.device)  # (1, prompt tokens)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit)
    answer: list[int] = output[0, len(prompt) :].tolist()
    seconds = time.perf_counter() - started
    return _text(tokenizer, answer[:-1] if answer[-1] in stop_ids else answer), seconds


def _free_positions(model: PeftModel, prompt: Sequence[int]) -> int:
    """Positions that the model has left for an answer; virtual tokens take some."""
    config, adapter = model.get_base_model().config.get_text_config(), model.active_peft_config
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return max(0, positions - len(prompt) - (adapter.num_virtual_tokens if adapter.is_prompt_learning else 0))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def _report_entry(pair: AnswerPair, spec: Evaluation) -> dict[str, Any]:
    answers: dict[str, Any] = {"base": pair.base, "adapter": pair.adapter}
    return answers if pair.max_new_tokens == spec.max_new_tokens else answers | {"max_new_tokens": pair.max_new_tokens}
