"""One base on the device, adapters switched on it, text out of it: what answers chats with torch."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.published import fetch_published
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.chat.prompts import Prompt, Prompts
from qlora_service.chat.text import TextStream
from qlora_service.chat.wire import AdapterRef, ContextTooLong, Finished, GenerationRequest, Sampling
from qlora_service.errors import InvalidRequest, JobFailed, QLoRAError, Unavailable
from qlora_service.models.adapters import CONFIG, NAME, WEIGHTS, detach, load_adapter
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization
from qlora_service.training.device import choose_device, compute_dtype, is_out_of_memory, release_memory
from workers.warm_base import BaseHolder, BaseRequest

KEPT_ADAPTERS = 4
"""Attached at a time; one of rank 16 on an 8B base has some 170 MB."""
CHAT_TEMPLATE = "chat_template.jinja"
GREEDY_BELOW = 1e-4
"""Logits divided by a smaller temperature may overflow."""


@dataclass(frozen=True)
class Attached:
    """An adapter on the base."""

    name: str
    """What PEFT calls it"""
    chat_template: str


class Engine:
    """Continues conversations and texts, one at a time; a context manager."""

    def __init__(
        self,
        base: BaseModel,
        quantization: Quantization,
        artifacts: ArtifactStore,
        scratch: Path,
        bases: BaseHolder,
        *,
        cache: QuantizedCache | None = None,
        needs_gpu: bool,
    ) -> None:
        """Loads the base, unless `bases` has it. Raises: InvalidModel, JobFailed; Unavailable, without the memory."""
        disable_progress_bar()  # a log is no terminal
        self._device = choose_device(needs_gpu)
        dtype = compute_dtype(quantization.compute_dtype, self._device)
        self._weights_sha256 = base.weights_sha256
        self._artifacts, self._scratch = artifacts, scratch
        try:
            warm, self.base_source = bases.get(BaseRequest(base, quantization, dtype, self._device, cache))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Unavailable(f"the device has not enough memory for {base.name}: use a smaller base model") from error
        self._adapters = Adapters(warm.model)
        self._positions = base.max_positions or sys.maxsize
        self._prompts = Prompts(base.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prompts.__exit__(kind, error, trace)
        self._adapters.clear()

    def generate(self, request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        """How the answer ended, of which every piece of text went to `show`, which may raise to end it.

        `show` is called after every token, with "" where there is nothing to show yet.

        Raises:
            ContextTooLong: with what was asked for, it is more than the base has positions for.
            InvalidRequest, InvalidModel: the chat template refuses the conversation.
            Unavailable: the device's memory does not do.
        """
        try:
            attached = None if request.adapter is None else self._attach(request.adapter)
            prompt = self._prompt(request, attached)
            limit = self._room(request, prompt, attached)
            return self._continue(prompt, request.sampling, limit, attached, show)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self._device)
        raise Unavailable("the device has not enough memory for this: send a shorter conversation, or max_tokens")

    def _attach(self, wanted: AdapterRef) -> Attached:
        if (known := self._adapters.find(wanted)) is not None:
            return known
        key = job_key(wanted.job_id, wanted.attempt, MANIFEST)
        manifest = Manifest.model_validate_json(b"".join(self._artifacts.read(key)))
        if manifest.base_model["weights_sha256"] != self._weights_sha256:
            raise InvalidRequest(
                f"job {wanted.job_id} was trained on other weights of {manifest.base_model['name']} than the catalog "
                "has now: import those again, or train anew",
                location="model",
            )
        files = tuple(file for file in manifest.files if file.name in (WEIGHTS, CONFIG, CHAT_TEMPLATE))
        with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            try:
                fetch_published(manifest.model_copy(update={"files": files}), self._artifacts, Path(directory))
            except JobFailed as error:
                raise QLoRAError(error.message) from error
            return self._adapters.attach(wanted, Path(directory))

    def _prompt(self, request: GenerationRequest, attached: Attached | None) -> Prompt:
        if request.messages is None:
            return self._prompts.text(request.text)
        template = None if attached is None else attached.chat_template
        return self._prompts.chat(request.messages, request.tools, template)

    def _room(self, request: GenerationRequest, prompt: Prompt, attached: Attached | None) -> int:
        """Tokens that the answer may have. Raises: ContextTooLong, InvalidRequest."""
        tokens, wanted = len(prompt.ids), request.sampling.max_tokens
        place = "prompt" if request.messages is None else "messages"
        if not tokens:
            raise InvalidRequest(
                "the prompt is empty, and this model has no token that texts begin with", location=place
            )
        left = self._positions - tokens - (0 if attached is None else self._adapters.virtual_tokens)
        if left < (wanted or 1):
            asked = f" and {wanted} of the answer" if wanted else ""
            raise ContextTooLong(
                f"this model has room for {self._positions} tokens; there are {tokens} of the prompt{asked}: shorten "
                "it, or lower max_tokens",
                location=place,
            )
        return wanted or left

    @torch.no_grad()
    def _continue(
        self, prompt: Prompt, sampling: Sampling, limit: int, attached: Attached | None, show: Callable[[str], None]
    ) -> Finished:
        watch = _Watch(TextStream(self._prompts.tokenizer, sampling.stop), show)
        ids = torch.tensor([prompt.ids], device=self._device)  # (1, tokens)
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        with self._adapters.active(attached) as (model, base):
            # generate() would fill what it is not told from the settings that came with the base.
            base.generation_config = _generation_config(prompt, sampling, limit)
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([watch])
            )
        generated = output[0, len(prompt.ids) :].tolist()
        show(watch.stream.end())
        stopped = watch.stream.stopped or generated[-1] in prompt.stop_ids
        return Finished(
            reason="stop" if stopped else "length", prompt_tokens=len(prompt.ids), completion_tokens=len(generated)
        )


class Adapters:
    """The base and what is attached to it. Of plain LoRA several stay attached; any other adapter is alone."""

    def __init__(self, base: PreTrainedModel) -> None:
        base.eval()
        self._base = base
        self._model: PeftModel | None = None
        self._attached: dict[AdapterRef, Attached] = {}
        """The least recently used first"""

    @property
    def virtual_tokens(self) -> int:
        """Positions that the adapter in use takes."""
        config = None if self._model is None else self._model.active_peft_config
        return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0

    def find(self, wanted: AdapterRef) -> Attached | None:
        """The adapter, if it is attached: in use from now on."""
        attached = self._attached.pop(wanted, None)
        if attached is not None:
            assert self._model is not None
            self._attached[wanted] = attached
            self._model.set_adapter(attached.name)
        return attached

    def attach(self, wanted: AdapterRef, directory: Path) -> Attached:
        """The adapter of these files, in use from now on."""
        template = directory / CHAT_TEMPLATE
        chat_template = template.read_text(encoding="utf-8")
        name = NAME
        if self._model is not None:
            configs = (self._model.active_peft_config, PeftConfig.from_pretrained(str(directory)))
            if not all(map(_is_plain_lora, configs)):
                self.clear()
        if self._model is None:
            self._model = load_adapter(self._base, directory)
        else:
            while len(self._attached) >= KEPT_ADAPTERS:
                self._model.delete_adapter(self._attached.pop(next(iter(self._attached))).name)
            name = f"{wanted.job_id}-{wanted.attempt}"
            self._model.load_adapter(str(directory), adapter_name=name, local_files_only=True)
            self._model.set_adapter(name)
        self._model.eval()
        self._attached[wanted] = Attached(name, chat_template)
        return self._attached[wanted]

    @contextmanager
    def active(self, attached: Attached | None) -> Iterator[tuple[Any, PreTrainedModel]]:
        """What generates with the adapter, or without any; and the base itself."""
        with ExitStack() as stack:
            # transformers gives them along; of a prompt method PEFT leaves them to the cache's length.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            if attached is None and self._model is not None:
                stack.enter_context(self._model.disable_adapter())
            yield self._base if attached is None else self._model, self._base

    def clear(self) -> None:
        """Take everything off the base."""
        if self._model is None:
            return
        base = detach(self._model)
        if hasattr(base, "peft_config"):  # left behind by some methods, and taken for an adapter by the next one
            del base.peft_config
        self._model = None
        self._attached.clear()


def _is_plain_lora(config: Any) -> bool:
    """Whether PEFT can hold several such adapters on one base: trained token rows are wrapped one at a time."""
    return config.peft_type == PeftType.LORA and not config.trainable_token_indices


class _Watch(StoppingCriteria):
    """Sees every token as it comes: shows its text, and stops at a stop string."""

    def __init__(self, stream: TextStream, show: Callable[[str], None]) -> None:
        self.stream = stream
        self._show = show

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._show(self.stream.add(int(input_ids[0, -1])))
        return torch.tensor([self.stream.stopped], device=input_ids.device)


def _generation_config(prompt: Prompt, sampling: Sampling, limit: int) -> GenerationConfig:
    stops = sorted(prompt.stop_ids)
    greedy = sampling.temperature < GREEDY_BELOW or sampling.top_p == 0.0
    chosen: dict[str, Any] = {"do_sample": False}
    if not greedy:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        max_new_tokens=limit,
        **chosen,
    )
