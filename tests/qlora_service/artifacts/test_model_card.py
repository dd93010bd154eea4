import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_service.artifacts.model_card import model_card
from qlora_service.specs import parse_spec

LOCAL_BASE = {"name": "tiny", "hub_id": None, "revision": None, "weights_sha256": "b" * 64}
HUB_BASE = {"name": "t", "hub_id": "org/tiny", "revision": "c0ffee", "weights_sha256": "b" * 64}
HELD_OUT = {"rows": 12, "source": "held-out rows", "loss_before": 3.14159, "loss_after": 1.5}
ACCURACY = {"accuracy_before": 0.5, "accuracy_after": 0.71249}


def card(
    base: dict[str, Any] = LOCAL_BASE,
    held_out: dict[str, Any] = HELD_OUT,
    dtype: str = "bfloat16",
    stops: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
    **groups: Any,
) -> str:
    spec = parse_spec({"base_model": "tiny", **groups}).model_dump(mode="json")
    dataset = {"sha256": "d" * 64, "rows": 350, "trained_on": 345, "left_out": 3, "warnings": [*warnings]}
    return model_card("job_1", base, dataset, spec, dtype, held_out, stops, {"torch": "2.13.0"})


def front(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def example(text: str) -> str:
    """The code that loads the adapter."""
    return text.split("```python\n")[1].split("```", maxsplit=1)[0]


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("base", "name"), [(LOCAL_BASE, "tiny"), (HUB_BASE, "org/tiny")])
def test_front_matter_names_the_base_and_the_library(base: dict[str, Any], name: str) -> None:
    assert front(card(base)) == {"base_model": name, "library_name": "peft", "tags": ["lora", "qlora"]}


@pytest.mark.parametrize(
    ("groups", "tags"),
    [
        ({"quantization": {"type": "fp4"}}, ["lora", "qlora"]),
        ({"quantization": {"type": "int8"}}, ["lora"]),
        ({"adapter": {"method": "prompt_tuning"}}, ["prompt-tuning"]),
        ({"objective": {"type": "dpo"}}, ["lora", "qlora", "dpo"]),
    ],
)
def test_tags_name_the_method_and_the_objective(groups: dict[str, Any], tags: list[str]) -> None:
    assert front(card(**groups))["tags"] == tags


def test_card_contains_the_losses_and_their_rows() -> None:
    assert table(card()) == [
        "|  | before | after |",
        "| --- | --- | --- |",
        "| loss on 12 held-out rows (nats per token) | 3.1416 | 1.5000 |",
        "| perplexity | 23.14 | 4.482 |",
    ]


@pytest.mark.parametrize(
    ("objective", "loss", "accuracy"),
    [
        ("supervised", "(nats per token)", "token accuracy"),
        ("dpo", "(DPO, per pair)", "pairs ranked correctly"),
        ("orpo", "(ORPO, per pair)", "pairs ranked correctly"),
        ("kto", "(KTO, per example)", "answers classified correctly"),
    ],
)
def test_card_contains_the_accuracy_of_the_objective(objective: str, loss: str, accuracy: str) -> None:
    rows = table(card(held_out=HELD_OUT | ACCURACY, objective={"type": objective}))
    assert f"| loss on 12 held-out rows {loss} |" in rows[2]
    assert rows[-1] == f"| {accuracy} | 50.0% | 71.2% |"
    assert any("perplexity" in row for row in rows) is (objective == "supervised")


def test_card_caps_the_perplexity_of_a_huge_loss() -> None:
    assert "| perplexity | over 1e304 | 4.482 |" in card(held_out=HELD_OUT | {"loss_before": 800.0})


def test_card_names_base_dataset_and_settings() -> None:
    text = card(HUB_BASE, name="Waves", training={"learning_rate": 1e-3}, adapter={"r": 4, "lora_alpha": 8})
    assert "# Waves\n" in text
    assert "at revision `c0ffee`" in text
    assert "345 rows" in text
    assert "learning rate 0.001, rank 4, alpha 8.0." in text
    assert {"d" * 64, "b" * 64} <= set(text.replace("`", " ").split())
    assert text.endswith("torch 2.13.0\n")


@pytest.mark.parametrize(
    ("adapter", "sentence", "size"),
    [
        ({"method": "lora"}, "A LoRA adapter for", "rank 16, alpha 32.0."),
        ({"use_dora": True}, "A DoRA adapter for", "rank 16, alpha 32.0."),
        ({"use_rslora": True}, "An rsLoRA adapter for", "rank 16, alpha 32.0."),
        ({"use_rslora": True, "use_dora": True}, "A rank-stabilized DoRA adapter for", "rank 16, alpha 32.0."),
        ({"method": "adalora"}, "An AdaLoRA adapter for", "mean rank 8, alpha 32.0."),
        ({"method": "ia3"}, "An (IA)³ adapter for", "learning rate 0.0002."),
        ({"method": "vera"}, "A VeRA adapter for", "rank 256."),
        ({"method": "oft"}, "An OFT adapter for", "block size 32."),
        ({"method": "prompt_tuning"}, "A soft prompt (prompt tuning) for", "virtual tokens 20."),
        ({"method": "prefix_tuning"}, "A prefix (prefix tuning) for", "virtual tokens 20."),
        ({"method": "p_tuning"}, "A soft prompt (P-tuning) for", "virtual tokens 20."),
        ({"method": "llama_adapter"}, "A LLaMA-Adapter for", "prompt length 10."),
    ],
)
def test_card_names_the_method_and_its_size(adapter: dict[str, Any], sentence: str, size: str) -> None:
    text = card(adapter=adapter)
    assert f"\n{sentence} `tiny`" in text
    assert f" {size} `manifest.json`" in text
    assert ("rank" in text.split("Trained on")[1]) is ("rank" in size)


def test_card_names_the_preference_objective() -> None:
    text = card(objective={"type": "orpo", "beta": 0.3})
    assert "alpha 32.0, ORPO with beta 0.3." in text


def test_card_lists_rows_left_out_and_warnings() -> None:
    warnings = [
        "left out: 3 rows (line 3, 4, 9 at /prompt): must be\na string",
        "12 rows (line 1): <think> is not trained",
    ]
    text = card(warnings=warnings)
    section = text.split("\n## ")[1]
    assert section.startswith("Rows\n\n3 of the dataset's 350 rows were left out.")
    assert section.split("```text\n")[1].split("```")[0].splitlines() == [
        "left out: 3 rows (line 3, 4, 9 at /prompt): must be a string",
        "12 rows (line 1): <think> is not trained",
    ]
    assert "\n\n## Load it\n" in text


def test_card_of_a_job_without_warnings_has_no_section_about_rows() -> None:
    assert "## Rows" not in card()
    assert "measured again.\n\n## Load it\n" in card()


def test_card_without_a_name_has_the_job_id_as_title() -> None:
    assert "# job_1\n" in card()
    assert "revision" not in card().split("## Load it")[0].split("---\n")[2]


@pytest.mark.parametrize(
    ("quantization", "storage"),
    [
        ({"type": "nf4"}, "4-bit NF4 with double quantization"),
        ({"type": "nf4", "double_quant": False}, "4-bit NF4"),
        ({"type": "fp4"}, "4-bit FP4 with double quantization"),
        ({"type": "int8"}, "8-bit"),
        ({"type": "none"}, "unquantized"),
    ],
)
def test_card_names_the_storage_of_the_base(quantization: dict[str, Any], storage: str) -> None:
    assert f"trained over the {storage} base." in card(quantization=quantization)


@pytest.mark.parametrize("double_quant", [True, False])
def test_example_quantizes_as_the_job_did(double_quant: bool) -> None:
    text = card(quantization={"double_quant": double_quant})
    ast.parse(example(text))
    assert f"bnb_4bit_use_double_quant={double_quant}," in example(text)


def test_example_for_an_unquantized_base_does_not_quantize() -> None:
    assert "BitsAndBytes" not in example(card(quantization={"type": "none"}))


def stop_tokens(trained: dict[str, int], base: dict[str, int], eos: str | None = None) -> dict[str, Any]:
    return {"trained": trained, "base": base, "template": {"<turn>": 7}, "eos": eos}


def answer_end(text: str) -> str:
    """The section about the end of an answer, in one line."""
    return " ".join(text.partition("## End of an answer")[2].partition("torch 2")[0].split())


def test_card_names_the_token_that_ends_an_answer() -> None:
    text = card(stops=stop_tokens({"</s>": 2}, {"</s>": 2}))
    assert answer_end(text) == "`</s>` (id 2) ends an answer. The base stops there by its own settings."
    assert "eos_token_id" not in example(text)
    text = card(stops=stop_tokens({"<eot>": 4, "<eom>": 5, "</s>": 2}, {"</s>": 2, "<eom>": 5, "<eot>": 4}))
    assert answer_end(text).startswith("`<eot>` (id 4), `<eom>` (id 5) and `</s>` (id 2) end an answer.")


def test_card_says_what_to_set_where_the_base_does_not_stop_at_the_end_of_an_answer() -> None:
    text = card(stops=stop_tokens({"<eot>": 4, "<eom>": 5}, {"</s>": 2, "<eom>": 5}))
    ast.parse(example(text))
    assert "\nbase.generation_config.eos_token_id = [2, 4, 5, 7]\nmodel = " in example(text)
    end = answer_end(text)
    assert "the base does not stop at `<eot>` (id 4), but at `</s>` (id 2) and `<eom>` (id 5)." in end
    assert "`--generation-config DIRECTORY_OF_THIS_FILE`" in end
    assert end.endswith("In other runtimes add `<eot>` (id 4) to the stop tokens or stop strings.")
    end = answer_end(card(stops=stop_tokens({"<eot>": 4}, {}, eos="<eot>")))
    assert "the base does not stop at `<eot>` (id 4). The code" in end
    assert end.endswith("The tokenizer's files here name `<eot>` as eos token, unlike those of the base.")


def test_card_says_that_no_token_ends_an_answer() -> None:
    text = card(stops=stop_tokens({}, {"</s>": 2}))
    assert answer_end(text).startswith("No token ends an answer: ")
    assert "eos_token_id" not in example(text)
    assert "End of an answer" not in card(stops=None)


def test_card_writes_a_token_in_one_line() -> None:
    assert "`\\n` (id 9) ends an answer." in answer_end(card(stops=stop_tokens({"\n": 9}, {"\n": 9})))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of a published adapter that loading requires."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [
        ({"type": "nf4"}, "Linear4bit"),
        ({"type": "fp4", "double_quant": False}, "Linear4bit"),
        ({"type": "int8"}, "Linear8bitLt"),
        ({"type": "none"}, "Linear"),
    ],
)
def test_example_loads_the_base_in_its_format_and_the_adapter(
    quantization: dict[str, Any], layer: str, tiny_model: Path, adapter: Path
) -> None:
    code = example(card(quantization=quantization, dtype="float32"))
    code = code.replace("PATH_OR_ID_OF_THE_BASE", str(tiny_model)).replace("DIRECTORY_OF_THIS_FILE", str(adapter))
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    projection = namespace["model"].get_base_model().model.layers[0].self_attn.q_proj
    assert "default" in projection.lora_A
    assert type(projection.base_layer).__name__ == layer
    if layer == "Linear4bit":
        state = projection.base_layer.weight.quant_state
        assert (state.quant_type, state.nested) == (quantization["type"], quantization.get("double_quant", True))
    if layer == "Linear8bitLt":
        assert projection.base_layer.state.threshold == 0.0
    assert namespace["tokenizer"].chat_template
