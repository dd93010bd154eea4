"""Generated answers against a greedy reference, their scores, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qlora_service.errors import InvalidSpec, JobCancelled
from qlora_service.specs import (
    Adapter,
    Evaluation,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    PromptTuning,
    Quantization,
    Training,
)
from qlora_service.training.evaluation.generation import (
    compare_answers,
    evaluate_generation,
    prompt_and_answer,
    question_ids,
    score,
)
from qlora_service.training.network.micro_batch import PER_DOCUMENT, LabeledRow, PreferencePair, TokenRow
from tests.tiny_model import MAX_POSITIONS
from tests.tiny_training import FLOAT64, NF4, load, network, run

ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(r=4),
    "dora": Lora(r=4, use_dora=True),
    "llama_adapter": LlamaAdapter(method="llama_adapter", adapter_len=4, adapter_layers=2),
    "prompt_tuning": PromptTuning(method="prompt_tuning", num_virtual_tokens=4),
    "prefix_tuning": PrefixTuning(method="prefix_tuning", num_virtual_tokens=4),
}
PROMPTS = [[9, 40, 77, 123, 205], list(range(60, 90)), [300, 301]]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def vivid_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with layer weights times twelve: its answers have many words, not one repeated."""
    path = tmp_path_factory.mktemp("vivid")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(12)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(vivid_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(vivid_model), local_files_only=True)


def adapted(directory: Path, method: str = "lora", quantization: Quantization = FLOAT64) -> PeftModel:
    """A model whose float32 adapter is far from its initial weights."""
    model = load(directory, quantization=quantization, adapter=ADAPTERS[method])
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def most_likely(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """The reference: one most likely token after the other, each from the whole text, without a cache."""
    answer: list[int] = []
    while len(answer) < NEW_TOKENS and tokenizer.eos_token_id not in answer:
        answer.append(int(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
    return answer


def text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    stop_ids: Collection[int] = (),
) -> list[str]:
    """Answers of the adapter."""
    pairs = compare_answers(model, tokenizer, prompts, NEW_TOKENS, {tokenizer.eos_token_id, *stop_ids}, lambda: None)
    return [pair.adapter for pair in pairs]


def row(tokenizer: PreTrainedTokenizerBase, line: int, *turns: str, ending: str = "<|im_end|>") -> TokenRow:
    """A conversation that starts with the user; every answer is trained, with the token that ends it."""
    ids: list[int] = []
    trained: list[bool] = []
    for index, turn in enumerate(turns):
        is_answer = index % 2 == 1
        rendered = f"{turn}{ending}" if is_answer else f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        part = tokenizer(rendered)["input_ids"]
        ids, trained = ids + part, trained + [is_answer] * len(part)
    return TokenRow(line, ids, trained)


@pytest.mark.parametrize("quantization", [FLOAT64, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_answers_equal_those_of_an_unmodified_peft_model(
    method: str, quantization: Quantization, vivid_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compares a model prepared for training, with fused modules and a token cache, with one that is not."""
    unmodified = adapted(vivid_model, method, quantization).eval()
    unmodified.get_base_model().set_attn_implementation("sdpa")
    trained = network(adapted(vivid_model, method, quantization)).model
    trained.get_base_model().set_attn_implementation(PER_DOCUMENT)

    pairs = compare_answers(trained, tokenizer, PROMPTS, NEW_TOKENS, {tokenizer.eos_token_id}, lambda: None)

    expected = [text(tokenizer, most_likely(unmodified, tokenizer, prompt)) for prompt in PROMPTS]
    assert [pair.adapter for pair in pairs] == expected
    with unmodified.disable_adapter():
        expected = [text(tokenizer, most_likely(unmodified, tokenizer, prompt)) for prompt in PROMPTS]
    assert [pair.base for pair in pairs] == expected
    assert all(pair.base != pair.adapter for pair in pairs)
    assert all(len(set(pair.adapter)) > 4 for pair in pairs), "answers of one repeated letter would prove little"


def state(model: PeftModel) -> tuple[Any, ...]:
    base = model.get_base_model()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return model.training, base.config._attn_implementation, base.config.use_cache, base.generation_config, trainable


def cancel() -> None:
    raise JobCancelled("stop")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("on_answer", [lambda: None, cancel], ids=["finished", "stopped"])
def test_the_model_is_left_as_it_was(
    on_answer: Callable[[], None], training: bool, vivid_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load(vivid_model).train(training)
    if not training:
        model.requires_grad_(False)  # as in a loaded adapter, which PEFT would make trainable
    before = state(model)
    try:
        compare_answers(model, tokenizer, PROMPTS[:1], 2, set(), on_answer)
    except JobCancelled:
        assert on_answer is cancel
    assert state(model) == before


def test_on_answer_is_called_after_every_answer_and_may_stop(
    vivid_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = adapted(vivid_model)
    calls: list[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) == 5:
            cancel()

    compare_answers(model, tokenizer, PROMPTS[:2], 2, set(), lambda: calls.append(0))
    assert calls == [0] * 4
    with pytest.raises(JobCancelled):
        compare_answers(model, tokenizer, PROMPTS, 2, set(), count)
    assert len(calls) == 5


def test_dropout_is_off(vivid_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load(vivid_model, FLOAT64, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.3).train()
    assert answers(model, tokenizer) == answers(model, tokenizer)


def test_an_answer_ends_with_a_stop_token(vivid_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(vivid_model)
    ids = most_likely(model.eval(), tokenizer, PROMPTS[0])
    assert len(set(ids)) > 8
    for stop in (ids[7], ids[3]):
        assert answers(model, tokenizer, PROMPTS[:1], {stop, 1}) == [text(tokenizer, ids[: ids.index(stop)])]


def test_the_models_own_sampling_settings_are_not_used(vivid_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(vivid_model)
    greedy = answers(model, tokenizer)
    sampling = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=9.0, num_beams=2, eos_token_id=2)
    model.get_base_model().generation_config = sampling
    assert answers(model, tokenizer) == greedy


@pytest.mark.parametrize(
    ("method", "prompt_tokens", "room"),
    [("lora", MAX_POSITIONS - 3, 3), ("lora", MAX_POSITIONS + 5, 0), ("prompt_tuning", MAX_POSITIONS - 6, 2)],
)
def test_an_answer_is_limited_to_the_free_positions(
    method: str, prompt_tokens: int, room: int, vivid_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = adapted(vivid_model, method)
    (pair,) = compare_answers(model, tokenizer, [[7] * prompt_tokens], NEW_TOKENS, set(), lambda: None)
    assert pair.max_new_tokens == room
    assert (pair.adapter == "") is (room == 0)


def test_the_prompt_is_everything_before_the_last_answer() -> None:
    ids, trained = [1, 5, 6, 7, 2, 8, 9, 10, 2, 2], [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    document = TokenRow(1, ids, [bool(flag) for flag in trained])
    assert prompt_and_answer(document, {2}) == ([1, 5, 6, 7, 2, 8, 9], [10])
    assert prompt_and_answer(document) == ([1, 5, 6, 7, 2, 8, 9], [10, 2, 2])
    ends_with_a_question = TokenRow(1, [*ids, 3, 4], [*document.trained, False, False])
    assert prompt_and_answer(ends_with_a_question, {2}) == ([1, 5, 6, 7, 2, 8, 9], [10])
    assert prompt_and_answer(TokenRow(1, [1, 2], [True, True])) is None


def test_scores_equal_those_of_the_libraries_on_english() -> None:
    references = ["The capital of France is Paris.", "There are 7 days in a week, aren't there?", "state-of_the art"]
    answers = ["The capital of France is Rome.\n", "There are 7 days in every week!", "state of the art it is"]
    scores = score(list(zip(answers, references, strict=True)))
    assert scores is not None
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for kind in ("rouge1", "rouge2", "rougeL"):
        measured = [
            rouge.score(reference, answer)[kind].fmeasure for answer, reference in zip(answers, references, strict=True)
        ]
        assert getattr(scores, kind) == pytest.approx(sum(measured) / 3)
    assert scores.bleu == pytest.approx(corpus_bleu([answer.strip() for answer in answers], [references]).score)
    assert 0 < scores.bleu < 100
    assert scores.exact_match == 0


def test_exact_match_is_the_share_of_equal_answers_ignoring_outer_white_space() -> None:
    scores = score([(" Paris\n", "Paris"), ("paris", "Paris"), ("Paris!", "Paris"), ("a\nb", "a\nb ")])
    assert scores is not None
    assert scores.exact_match == 0.5


@pytest.mark.parametrize("words", ["positive", "Столица Франции — Париж", "法国的首都是巴黎。", "パリです", "पेरिस है"])
def test_a_perfect_answer_has_a_perfect_score_in_any_script(words: str) -> None:
    scores = score([(words, words)])
    assert scores is not None
    assert (scores.exact_match, scores.rouge1, scores.rougeL) == (1.0, 1.0, 1.0)
    assert scores.bleu == pytest.approx(100)


def test_each_chinese_character_is_a_word() -> None:
    scores = score([("首都是巴黎abc", "首都是罗马abc")])
    assert scores is not None
    assert scores.rouge1 == pytest.approx(4 / 6)


def test_no_answers_have_no_scores_and_empty_answers_have_the_lowest() -> None:
    assert score([]) is None
    scores = score([("", "Paris")])
    assert scores is not None
    assert (scores.exact_match, scores.bleu, scores.rouge1, scores.rougeL) == (0, 0, 0, 0)


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|endoftext|>"], ids=["the model's end", "the template's own end"])
def test_an_adapter_trained_on_the_rows_scores_higher_than_the_base(
    ending: str, tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train_rows = [
        row(tokenizer, 4, "one", "Paris is the capital", ending=ending),
        row(tokenizer, 2, "two", "seven days in the week", "three", "a little house", ending=ending),
    ]
    model = load(tiny_model, adapter=Lora(r=16, target_modules=["embed_tokens", "q_proj", "v_proj"]))
    run(model, train_rows, Training(batch_size=2, learning_rate=0.01, max_grad_norm=1.0), steps=40)
    spec = Evaluation(generate_rows=5, questions=["one", "x" * 3000], max_new_tokens=12)
    calls: list[int] = []
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}

    report = evaluate_generation(network(model), tokenizer, train_rows, spec, stop_ids, lambda: calls.append(1))

    assert json.loads(json.dumps(report)) == report
    assert report["scores"]["adapter"]["exact_match"] == 1.0
    assert report["scores"]["adapter"]["rougeL"] == 1.0
    assert report["scores"]["base"]["exact_match"] == 0.0
    first, second = report["rows"]
    assert (first["line"], first["reference"], first["adapter"]) == (4, "Paris is the capital", "Paris is the capital")
    assert (second["line"], second["reference"], second["adapter"]) == (2, "a little house", "a little house")
    assert second["question"] == "user\ntwo\nassistant\nseven days in the weekuser\nthree\nassistant"
    assert "max_new_tokens" not in first
    answered, too_long = report["questions"]
    assert (answered["question"], answered["adapter"]) == ("one", "Paris is the capital")
    assert (too_long["question"], too_long["max_new_tokens"]) == ("x" * 3000, 0)
    assert report["seconds"]["base"] > 0
    assert report["seconds"]["adapter"] > 0
    assert len(calls) == 8


def test_rows_without_a_question_and_undesirable_answers_are_left_out(
    vivid_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    story = tokenizer("Once upon a time")["input_ids"]
    held_out = [
        TokenRow(1, story, [True] * len(story)),
        TokenRow(2, [tokenizer.bos_token_id, *story], [False] + [True] * len(story)),
        LabeledRow(row(tokenizer, 3, "q", "unwanted"), desirable=False),
        LabeledRow(row(tokenizer, 4, "q", "wanted"), desirable=True),
        PreferencePair(row(tokenizer, 5, "q", "chosen"), row(tokenizer, 5, "q", "rejected")),
        row(tokenizer, 6, "q" * 3000, "last"),
        row(tokenizer, 7, "q", "one too many"),
    ]
    spec = Evaluation(generate_rows=3, max_new_tokens=2)
    report = evaluate_generation(network(adapted(vivid_model)), tokenizer, held_out, spec, set(), lambda: None)
    assert [(entry["line"], entry["reference"]) for entry in report["rows"]] == [
        (4, "wanted"),
        (5, "chosen"),
        (6, "last"),
    ]
    assert len(report["rows"][2]["question"]) == 2000
    assert report["rows"][2]["question"].endswith("q\nassistant")


def test_text_alone_has_no_scores(vivid_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    held_out = [TokenRow(1, [5, 6, 7], [True] * 3)]
    report = evaluate_generation(
        network(adapted(vivid_model)), tokenizer, held_out, Evaluation(generate_rows=3), set(), lambda: None
    )
    assert report == {"scores": None, "rows": [], "questions": [], "seconds": {"base": 0, "adapter": 0}}


def test_a_question_is_rendered_by_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer.decode(question_ids(tokenizer, "How many days?"))
    assert prompt == "<|im_start|>user\nHow many days?<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_a_question_is_plain_text(vivid_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(vivid_model), local_files_only=True)
    plain.chat_template = None
    assert plain.decode(question_ids(plain, "How many days?")) == "How many days?"


def test_a_question_that_the_template_refuses_is_named(vivid_model: Path) -> None:
    strict = AutoTokenizer.from_pretrained(str(vivid_model), local_files_only=True)
    strict.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(InvalidSpec, match=r"'How many days'.*system message must come first") as caught:
        question_ids(strict, "How many days")
    assert caught.value.location == "/evaluation/questions"
