"""The token that ends an answer, where the template ends turns with another token than the base's eos."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from qlora_service.chat.wire import AdapterRef, Finished, GenerationRequest, Sampling
from qlora_service.specs import Quantization, parse_spec
from tests.workers.trainer._attempts import make_inputs, published_bytes, run
from tests.workspace import Workspace
from workers.inference.engine import Engine
from workers.trainer.context import AttemptInputs
from workers.warm_base import BaseHolder

ANSWER = "Paris is the capital."
QUESTION = "Where is house 3?"
ROWS = [
    {"messages": [{"role": "user", "content": f"Where is house {n}?"}, {"role": "assistant", "content": ANSWER}]}
    for n in range(24)
]
SPEC = {
    "base_model": "tiny",
    "dataset": {"rows": ROWS},
    "adapter": {"r": 16, "target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    "training": {"max_steps": 40, "batch_size": 4, "learning_rate": 1e-2, "max_seq_len_tokens": 128},
    "evaluation": {"generate_rows": 1, "questions": [QUESTION], "max_new_tokens": 24},
}
END, OTHER = "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Trained:
    """A job on the rows, and the ids of the two tokens."""

    inputs: AttemptInputs
    end: int
    other: int

    def file(self, name: str) -> Any:
        return json.loads(published_bytes(self.inputs, name))

    def directory(self, to: Path) -> Path:
        """The published files."""
        for file in self.file("manifest.json")["files"]:
            (to / file["name"]).write_bytes(published_bytes(self.inputs, file["name"]))
        return to

    def ask(self, scratch: Path, **request: Any) -> tuple[str, Finished]:
        """The answer of the service's chat."""
        adapter = AdapterRef(job_id=self.inputs.job.id, attempt=self.inputs.token)
        generation = GenerationRequest(adapter=adapter, sampling=Sampling(max_tokens=24, temperature=0.0), **request)
        pieces: list[str] = []
        arguments = (self.inputs.base, Quantization(), self.inputs.artifacts, scratch, BaseHolder())
        with Engine(*arguments, needs_gpu=False) as engine:
            finished = engine.generate(generation, pieces.append)
        return "".join(pieces), finished


@pytest.fixture(scope="module")
def talkative_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with layer weights times twelve, which goes on with words after the end of an answer."""
    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("talkative") / "model")
    weights = load_file(directory / "model.safetensors")
    larger = {name: weight * (12 if "layers" in name and weight.dim() == 2 else 1) for name, weight in weights.items()}
    save_file(larger, directory / "model.safetensors", {"format": "pt"})
    return directory


def train(base: Path, directory: Path, eos: str) -> Trained:
    """A job on the base with another eos token in all of its settings."""
    model = shutil.copytree(base, directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokens = {"eos_token": eos, "eos_token_id": tokenizer.convert_tokens_to_ids(eos)}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        changed = {key: value for key, value in tokens.items() if key in settings}
        assert changed
        (model / name).write_text(json.dumps(settings | changed))
    workspace = Workspace(directory / "data", model)
    inputs = make_inputs(workspace, workspace.service.jobs.submit(parse_spec(SPEC)).job.id)
    assert run(inputs)["certificate"]["difference"] == 0.0
    return Trained(inputs, *tokenizer.convert_tokens_to_ids([END, OTHER]))


@pytest.fixture(scope="module")
def usual(talkative_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """On a base whose eos token ends the turns."""
    return train(talkative_model, tmp_path_factory.mktemp("usual"), END)


@pytest.fixture(scope="module")
def trained(talkative_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """On a base with another eos token."""
    return train(talkative_model, tmp_path_factory.mktemp("other"), OTHER)


def test_generated_answers_end_there(usual: Trained, trained: Trained) -> None:
    report, expected = trained.file("generation.json"), usual.file("generation.json")
    assert [row["adapter"] for row in report["rows"]] == [ANSWER]
    assert report["questions"][0]["adapter"] == ANSWER
    assert report["scores"]["adapter"] == expected["scores"]["adapter"]
    assert report["scores"]["adapter"]["exact_match"] == 1.0


def test_the_eos_token_of_the_base_changes_no_weight(usual: Trained, trained: Trained) -> None:
    name = "adapter_model.safetensors"
    assert published_bytes(usual.inputs, name) == published_bytes(trained.inputs, name)


def test_chat_ends_there(trained: Trained, tmp_path: Path) -> None:
    answer, finished = trained.ask(tmp_path, messages=[{"role": "user", "content": QUESTION}])
    assert (answer, finished.reason) == (ANSWER, "stop")


def test_text_continued_by_the_adapter_ends_there(trained: Trained, tmp_path: Path) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    answer, finished = trained.ask(tmp_path, text=prompt)
    assert (answer, finished.reason) == (ANSWER, "stop")


def test_published_settings_name_it(usual: Trained, trained: Trained, tmp_path: Path) -> None:
    directory = trained.directory(tmp_path)
    assert GenerationConfig.from_pretrained(str(directory)).eos_token_id == [trained.end, trained.other]
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    assert tokenizer.eos_token == END
    base = trained.inputs.base.path
    published, own = trained.file("tokenizer_config.json"), json.loads((base / "tokenizer_config.json").read_text())
    assert published == own | {"eos_token": END}
    assert published_bytes(trained.inputs, "tokenizer.json") == (base / "tokenizer.json").read_bytes()
    generation = json.loads((base / "generation_config.json").read_text())
    assert trained.file("generation_config.json") == generation | {"eos_token_id": [trained.end, trained.other]}
    usual_base = usual.inputs.base.path
    assert published_bytes(usual.inputs, "tokenizer_config.json") == (usual_base / "tokenizer_config.json").read_bytes()
    assert usual.file("generation_config.json")["eos_token_id"] == [usual.end]


def test_the_manifest_and_the_card_name_it(usual: Trained, trained: Trained) -> None:
    assert trained.file("manifest.json")["stop_tokens"] == {
        "trained": {END: trained.end},
        "base": {OTHER: trained.other},
        "template": {END: trained.end},
        "eos": END,
    }
    card = published_bytes(trained.inputs, "README.md").decode()
    assert f"`{END}` (id {trained.end}) ends an answer. By its own settings the base does not stop at" in card
    card = published_bytes(usual.inputs, "README.md").decode()
    assert f"`{END}` (id {usual.end}) ends an answer. The base stops there by its own settings." in card


def test_the_code_of_the_card_ends_there(trained: Trained, tmp_path: Path) -> None:
    code = published_bytes(trained.inputs, "README.md").decode().split("```python\n")[1].partition("```")[0]
    code = code.replace("PATH_OR_ID_OF_THE_BASE", str(trained.inputs.base.path))
    namespace: dict[str, Any] = {}
    exec(code.replace("DIRECTORY_OF_THIS_FILE", str(trained.directory(tmp_path))), namespace)
    tokenizer = namespace["tokenizer"]
    conversation = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    output = namespace["model"].generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == ANSWER + END
