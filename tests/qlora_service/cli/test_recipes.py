from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_service.cli import main
from qlora_service.cli.spec_file import read_spec_file
from qlora_service.specs import RECIPES, parse_spec


def qlora(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that needs no service."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    output = capsys.readouterr()
    assert isinstance(exited.value.code, int)
    return exited.value.code, output.out, output.err


def test_recipes_are_listed_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = qlora(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    assert RECIPES["fast"].title in out


@pytest.mark.parametrize("name", RECIPES)
def test_printed_recipe_is_an_equivalent_configuration(
    name: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = qlora(capsys, "recipes", name)
    assert out.startswith(f"# {RECIPES[name].title}\n# Source: {RECIPES[name].source}\n")
    assert yaml.safe_load(out) == RECIPES[name].values
    file = tmp_path / "job.yaml"
    file.write_text(out + "base_model: tiny\n", encoding="utf-8")
    document, _ = read_spec_file(file)
    named = parse_spec({"base_model": "tiny", "recipe": name})
    assert parse_spec(document) == named.model_copy(update={"recipe": None})


def test_recipes_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(qlora(capsys, "recipes", "--json")[1])
    assert {recipe["name"]: recipe["values"] for recipe in every} == {
        name: recipe.values for name, recipe in RECIPES.items()
    }
    assert json.loads(qlora(capsys, "recipes", "fast", "--json")[1]) == every[-1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("qlora_paper", "did you mean 'qlora-paper'?"), ("zzz", "the recipes are qlora-paper, lit-llama-alp")],
)
def test_unknown_recipe_is_one_message(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = qlora(capsys, "recipes", name)
    assert code == 1
    assert err.startswith(f"error: there is no recipe {name!r}: {hint}")
    assert err.count("\n") == 1
