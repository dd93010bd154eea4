"""Imports into the catalog, its records and its errors."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_service.errors import Conflict, InvalidModel, Unavailable
from qlora_service.models.catalog import catalog as catalog_module
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.models.catalog.safetensors_header import read_header


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models")


def directory_names(catalog: Catalog) -> list[str]:
    return sorted(path.name for path in catalog.models_dir.iterdir())


def test_imported_directory_is_copied_and_described(catalog: Catalog, tiny_model: Path) -> None:
    model = catalog.import_model("tiny", tiny_model)
    assert model.path == catalog.models_dir / "tiny"
    assert (model.source, model.hub_id, model.revision, model.reference) == ("directory", None, None, "tiny")
    assert (model.vocab_size, model.hidden_size, model.num_layers, model.max_positions) == (512, 64, 2, 512)
    for path in tiny_model.iterdir():
        assert (model.path / path.name).read_bytes() == path.read_bytes()
    assert directory_names(catalog) == ["tiny"]


def test_record_survives_a_restart_and_a_move_of_the_data_directory(
    catalog: Catalog, tiny_model: Path, tmp_path: Path
) -> None:
    model = catalog.import_model("org/tiny@v1", tiny_model)
    assert Catalog(catalog.models_dir).get("org/tiny@v1") == model
    catalog.models_dir.rename(tmp_path / "moved")
    moved = Catalog(tmp_path / "moved").get("org/tiny@v1")
    assert moved.path == tmp_path / "moved/org--tiny@v1"
    assert moved.as_dict() == model.as_dict()
    assert str(tmp_path) not in json.dumps(model.as_dict())


def test_weights_hash_covers_names_and_contents(catalog: Catalog, tiny_model: Path, model_directory: Path) -> None:
    weights = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors {weights}\n".encode()).hexdigest()
    assert catalog.import_model("one", tiny_model).weights_sha256 == expected
    content = bytearray((model_directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model_directory / "model.safetensors").write_bytes(content)
    assert catalog.import_model("two", model_directory).weights_sha256 != expected


def test_only_files_of_the_model_are_copied(catalog: Catalog, model_directory: Path) -> None:
    copied = {path.name for path in model_directory.iterdir()} | {"LICENSE", "README.md", "merges.txt"}
    for name in ["LICENSE", "README.md", "merges.txt", "notes.txt", "flax_model.msgpack", "qlora-model.json"]:
        (model_directory / name).write_text("{}")
    (model_directory / "consolidated.safetensors").write_bytes((model_directory / "model.safetensors").read_bytes())
    (model_directory / "onnx").mkdir()
    (model_directory / "onnx/config.json").write_text("{}")
    model = catalog.import_model("tiny", model_directory)
    assert {path.name for path in model.path.iterdir()} == copied | {"qlora-model.json"}


def test_template_for_tools_is_imported(catalog: Catalog, model_directory: Path) -> None:
    (model_directory / "additional_chat_templates").mkdir()
    (model_directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    model = catalog.import_model("tools", model_directory)
    messages = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"name": "clock"}]):
        imported, source = (
            AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tools=tools, tokenize=False)
            for path in (model.path, model_directory)
        )
        assert imported == source


def test_index_is_copied_only_if_its_shards_are_used(catalog: Catalog, model_directory: Path) -> None:
    index = "model.safetensors.index.json"
    tensors = read_header(model_directory / "model.safetensors")
    (model_directory / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "shard.safetensors")}))
    (model_directory / "shard.safetensors").write_bytes((model_directory / "model.safetensors").read_bytes())
    both = catalog.import_model("both", model_directory)
    assert {path.name for path in both.path.glob("*safetensors*")} == {"model.safetensors"}
    (model_directory / "model.safetensors").unlink()
    sharded = catalog.import_model("sharded", model_directory)
    assert {path.name for path in sharded.path.glob("*safetensors*")} == {"shard.safetensors", index}
    assert sharded.parameters == both.parameters


def test_paths_of_other_machines_are_removed(catalog: Catalog, model_directory: Path) -> None:
    for name, extra in {
        "config.json": {"_name_or_path": "/home/someone/model"},
        "tokenizer_config.json": {"name_or_path": "/home/someone", "is_local": True, "local_files_only": True},
    }.items():
        document = json.loads((model_directory / name).read_bytes())
        (model_directory / name).write_text(json.dumps(document | extra))
    model = catalog.import_model("tiny", model_directory)
    for name in ["config.json", "tokenizer_config.json"]:
        document = json.loads((model.path / name).read_bytes())
        assert not {"_name_or_path", "name_or_path", "is_local", "local_files_only"} & document.keys()
    assert document["eos_token"] == "<|im_end|>"


def test_taken_name_is_a_conflict_and_the_model_stays(catalog: Catalog, tiny_model: Path) -> None:
    model = catalog.import_model("tiny", tiny_model)
    with pytest.raises(Conflict, match="'tiny' exists already"):
        catalog.import_model("tiny", tiny_model)
    assert catalog.get("tiny") == model


def test_one_of_four_concurrent_imports_succeeds(catalog: Catalog, tiny_model: Path) -> None:
    outcomes: list[BaseModel | Conflict] = []
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        try:
            outcomes.append(catalog.import_model("tiny", tiny_model))
        except Conflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, BaseModel)]
    assert len(outcomes) == 4
    assert catalog.list() == [winner]
    assert directory_names(catalog) == ["tiny"]


def test_refused_import_leaves_nothing(catalog: Catalog, model_directory: Path) -> None:
    (model_directory / "modeling.py").write_text("")
    with pytest.raises(InvalidModel, match=r"modeling\.py is Python code"):
        catalog.import_model("tiny", model_directory)
    assert directory_names(catalog) == []
    assert catalog.list() == []


def test_leftovers_of_a_crash_are_invisible_and_deleted_by_the_next_import(catalog: Catalog, tiny_model: Path) -> None:
    crashed = catalog.models_dir / ".staging-0123"
    model = catalog.import_model("tiny", tiny_model)
    model.path.rename(crashed)
    assert catalog.list() == []
    with pytest.raises(InvalidModel):
        catalog.get("tiny")
    catalog.import_model("tiny", tiny_model)
    assert directory_names(catalog) == ["tiny"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b/c", "/a", "a/", "../a", "a b", "a--b", "a@", "ä", "a\n", "a" * 201]
)
def test_name_that_could_be_another_path_is_refused(catalog: Catalog, tiny_model: Path, name: str) -> None:
    with pytest.raises(InvalidModel, match="cannot name a base model"):
        catalog.import_model(name, tiny_model)
    with pytest.raises(InvalidModel, match="there is no base model"):
        catalog.get(name)
    with pytest.raises(InvalidModel, match="there is no base model"):
        catalog.remove(name)


def test_error_for_an_unknown_model_names_the_closest_and_all_known_models(catalog: Catalog, tiny_model: Path) -> None:
    with pytest.raises(InvalidModel, match=r"The catalog is empty.*qlora models import NAME PATH"):
        catalog.get("smollm2")
    catalog.import_model("SmolLM2-135M", tiny_model)
    catalog.import_model("zephyr", tiny_model)
    with pytest.raises(InvalidModel) as caught:
        catalog.get("smollm2")
    assert "did you mean 'SmolLM2-135M'? Known: SmolLM2-135M, zephyr." in caught.value.message
    with pytest.raises(InvalidModel) as caught:
        catalog.get("qqq")
    assert "did you mean" not in caught.value.message


def test_directory_name_of_a_model_is_not_accepted_as_its_name(catalog: Catalog, tiny_model: Path) -> None:
    catalog.import_model("org/tiny", tiny_model)
    with pytest.raises(InvalidModel):
        catalog.get("org--tiny")


def test_list_is_sorted_by_name(catalog: Catalog, tiny_model: Path) -> None:
    for name in ["b", "a/z", "c"]:
        catalog.import_model(name, tiny_model)
    assert [model.name for model in catalog.list()] == ["a/z", "b", "c"]


def test_unreadable_record_is_left_out_explained_and_removable(catalog: Catalog, tiny_model: Path) -> None:
    for name in ["good", "bad"]:
        catalog.import_model(name, tiny_model)
    (catalog.models_dir / "bad/qlora-model.json").write_text('{"name": "bad"}')
    assert [model.name for model in catalog.list()] == ["good"]
    with pytest.raises(InvalidModel, match="remove the model and import it again"):
        catalog.get("bad")
    catalog.remove("bad")
    assert directory_names(catalog) == ["good"]


@pytest.mark.parametrize("source", ["/no/such/path", "./no-such", "a/b/c", "org/name@../../x"])
def test_source_that_is_neither_path_nor_hub_id_is_refused(catalog: Catalog, source: str) -> None:
    with pytest.raises(InvalidModel, match="does not exist: give a Hugging Face directory, a GGUF file or a hub id"):
        catalog.import_model("x", source)


def test_file_without_gguf_content_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InvalidModel, match="is not a GGUF file"):
        catalog.import_model("x", tmp_path / "model.gguf")


def test_hanging_conversion_is_stopped_and_leaves_nothing(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shorter than the import of torch.
    monkeypatch.setattr(catalog_module, "CONVERSION_S", 0.1)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Unavailable, match="could not be converted within"):
        catalog.import_model("x", tmp_path / "model.gguf")
    assert directory_names(catalog) == []


def test_models_directory_that_cannot_be_written_is_explained(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(Unavailable, match="check disk space and permissions"):
        Catalog(tmp_path / "models").import_model("x", tiny_model)


def test_import_and_list_need_no_torch(tiny_model: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qlora_service.models.catalog.catalog import Catalog\n"
        "catalog = Catalog(Path(sys.argv[1])); catalog.import_model('tiny', sys.argv[2]); catalog.list()\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "models"), str(tiny_model)], check=True, env=dict(os.environ)
    )


def test_module_shapes_list_the_modules_that_an_adapter_can_target(tmp_path: Path, tiny_model: Path) -> None:
    catalog = Catalog(tmp_path)
    shapes = catalog.module_shapes(catalog.import_model("tiny", tiny_model))
    assert shapes["down_proj"] == {(64, 128)}
    names = set(shapes)
    assert names >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("norm" in name for name in names)
