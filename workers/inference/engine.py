"""Text generation for chats: one base model on the device, and the adapters that are switched on it."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest
from qlora_service.artifacts.published import fetch_published
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.chat.prompts import Prompt, Prompts
from qlora_service.chat.text import TextStream
from qlora_service.chat.wire import AdapterRef, ContextTooLong, Finished, GenerationRequest, Sampling
from qlora_service.data.rendering.tokenizer_settings import CHAT_TEMPLATE, GENERATION_CONFIG, read_tokenizer_settings
from qlora_service.errors import InvalidRequest, JobFailed, QLoRAError, Unavailable
from qlora_service.models.adapters import CONFIG, NAME, WEIGHTS, detach, load_adapter
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.catalog.embeddings import embedding_rows
from qlora_service.specs import Quantization
from qlora_service.training.device import choose_device, compute_dtype, is_out_of_memory, release_memory
from workers.warm_base import BaseHolder, BaseRequest

MAX_ATTACHED_ADAPTERS = 4
"""An adapter of rank 16 on an 8B base takes about 170 MB."""
FILES = {WEIGHTS, CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG}
"""Files of a published adapter that a chat needs"""
GREEDY_BELOW = 1e-4
"""Temperatures below this are treated as 0: logits divided by them may overflow."""


@dataclass(frozen=True)
class AttachedAdapter:
    """An adapter that is attached to the base."""

    name: str
    """PEFT's name of the adapter"""
    chat_template: str | None
    stop_ids: frozenset[int]
    """Tokens that end its answers, as published"""


class Engine:
    """Continues conversations and plain texts, one at a time; a context manager."""

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
        """Loads the base, unless `bases` holds it.

        Raises:
            InvalidModel: transformers cannot load the base.
            JobFailed: the slot's GPU cannot be used.
            Unavailable: the device has too little memory.
        """
        disable_progress_bar()  # the log is not a terminal
        self._device = choose_device(needs_gpu)
        dtype = compute_dtype(quantization.compute_dtype, self._device)
        self._weights_sha256 = base.weights_sha256
        self._artifacts, self._scratch = artifacts, scratch
        try:
            warm, self.base_source = bases.get(BaseRequest(base, quantization, dtype, self._device, cache))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Unavailable(f"the device has too little memory for {base.name}: use a smaller base model") from error
        self._adapters = Adapters(warm.model)
        self._max_positions = base.max_positions or sys.maxsize
        self._prompts = Prompts(base.path, embeddings=embedding_rows(base))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prompts.__exit__(kind, error, trace)
        self._adapters.clear()

    def generate(self, request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        """The end of the answer, after `emit` has received its text piece by piece; `emit` may raise to end it.

        `emit` is called after every token, with "" if the token completes no text.

        Raises:
            ContextTooLong: prompt and answer exceed the positions of the base.
            InvalidRequest, InvalidModel: the chat template refuses the conversation.
            Unavailable: the device has too little memory.
        """
        try:
            attached = None if request.adapter is None else self._attach(request.adapter)
            prompt = self._prompt(request, attached)
            max_new_tokens = self._max_new_tokens(request, prompt, attached)
            return self._continue(prompt, request.sampling, max_new_tokens, attached, emit)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block: the error's traceback holds the tensors of the failed pass.
        release_memory(self._device)
        raise Unavailable(
            "the device has too little memory for this request: send a shorter conversation, or lower max_tokens"
        )

    def _attach(self, adapter: AdapterRef) -> AttachedAdapter:
        if (attached := self._adapters.find(adapter)) is not None:
            return attached
        key = job_key(adapter.job_id, adapter.attempt, MANIFEST_NAME)
        manifest = Manifest.model_validate_json(b"".join(self._artifacts.read(key)))
        if manifest.base_model["weights_sha256"] != self._weights_sha256:
            raise InvalidRequest(
                f"job {adapter.job_id} was trained on other weights of {manifest.base_model['name']} than the catalog "
                "has now: import those weights again, or run the job again",
                location="model",
            )
        files = tuple(file for file in manifest.files if file.name in FILES)
        with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            try:
                fetch_published(manifest.model_copy(update={"files": files}), self._artifacts, Path(directory))
            except JobFailed as error:
                raise QLoRAError(error.message) from error
            return self._adapters.attach(adapter, Path(directory))

    def _prompt(self, request: GenerationRequest, attached: AttachedAdapter | None) -> Prompt:
        template, stop_ids = (None, frozenset()) if attached is None else (attached.chat_template, attached.stop_ids)
        if request.messages is None:
            prompt = self._prompts.text(request.text)
        else:
            prompt = self._prompts.chat(request.messages, request.tools, template)
        return replace(prompt, stop_ids=prompt.stop_ids | stop_ids)

    def _max_new_tokens(self, request: GenerationRequest, prompt: Prompt, attached: AttachedAdapter | None) -> int:
        """The limit of the answer, in tokens. Raises: ContextTooLong, InvalidRequest."""
        prompt_tokens, requested = len(prompt.ids), request.sampling.max_tokens
        location = "prompt" if request.messages is None else "messages"
        if not prompt_tokens:
            raise InvalidRequest(
                "the prompt is empty, and this model has no beginning-of-sequence token", location=location
            )
        virtual_tokens = 0 if attached is None else self._adapters.virtual_tokens
        available = self._max_positions - prompt_tokens - virtual_tokens
        if available < (requested or 1):
            answer = f" and max_tokens is {requested}" if requested else ""
            raise ContextTooLong(
                f"this model has room for {self._max_positions} tokens; the prompt has {prompt_tokens}{answer}: "
                "shorten it, or lower max_tokens",
                location=location,
            )
        return requested or available

    @torch.no_grad()
    def _continue(
        self,
        prompt: Prompt,
        sampling: Sampling,
        max_new_tokens: int,
        attached: AttachedAdapter | None,
        emit: Callable[[str], None],
    ) -> Finished:
        streamer = _Streamer(TextStream(self._prompts.tokenizer, sampling.stop), prompt.stop_ids, emit)
        ids = torch.tensor([prompt.ids], device=self._device)  # (1, tokens)
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        with self._adapters.active(attached) as (model, base):
            # generate() takes every value that is not set here from the generation config of the base.
            base.generation_config = _generation_config(prompt, sampling, max_new_tokens)
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([streamer])
            )
        generated = output[0, len(prompt.ids) :].tolist()
        emit(streamer.stream.end())
        stopped = streamer.stream.stopped or generated[-1] in prompt.stop_ids
        return Finished(
            reason="stop" if stopped else "length", prompt_tokens=len(prompt.ids), completion_tokens=len(generated)
        )


class Adapters:
    """The base and the adapters attached to it: several plain LoRA adapters, or one of any other method."""

    def __init__(self, base: PreTrainedModel) -> None:
        base.eval()
        self._base = base
        self._model: PeftModel | None = None
        self._attached: dict[AdapterRef, AttachedAdapter] = {}
        """In order of use, the least recently used first"""

    @property
    def virtual_tokens(self) -> int:
        """Positions that the active adapter takes."""
        config = None if self._model is None else self._model.active_peft_config
        return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0

    def find(self, adapter: AdapterRef) -> AttachedAdapter | None:
        """The adapter, now the active one; None if it is not attached."""
        attached = self._attached.pop(adapter, None)
        if attached is not None:
            assert self._model is not None
            self._attached[adapter] = attached
            self._model.set_adapter(attached.name)
        return attached

    def attach(self, adapter: AdapterRef, directory: Path) -> AttachedAdapter:
        """The adapter whose files are in `directory`, now the active one."""
        settings, name = read_tokenizer_settings(directory), NAME
        if self._model is not None:
            configs = (self._model.active_peft_config, PeftConfig.from_pretrained(str(directory)))
            if not all(map(_is_plain_lora, configs)):
                self.clear()
        if self._model is None:
            self._model = load_adapter(self._base, directory)
        else:
            while len(self._attached) >= MAX_ATTACHED_ADAPTERS:
                self._model.delete_adapter(self._attached.pop(next(iter(self._attached))).name)
            name = f"{adapter.job_id}-{adapter.attempt}"
            self._model.load_adapter(str(directory), adapter_name=name, local_files_only=True)
            self._model.set_adapter(name)
        self._model.eval()
        self._attached[adapter] = AttachedAdapter(name, settings.chat_template, settings.eos_token_ids)
        return self._attached[adapter]

    @contextmanager
    def active(self, attached: AttachedAdapter | None) -> Iterator[tuple[Any, PreTrainedModel]]:
        """The model that generates with the adapter, or with none; and the base."""
        with ExitStack() as stack:
            # transformers passes position ids; with a prompt method PEFT derives them from the cache's length.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            if attached is None and self._model is not None:
                stack.enter_context(self._model.disable_adapter())
            yield self._base if attached is None else self._model, self._base

    def clear(self) -> None:
        """Detaches every adapter from the base."""
        if self._model is None:
            return
        base = detach(self._model)
        if hasattr(base, "peft_config"):  # some methods leave it behind; PEFT would treat it as an adapter
            del base.peft_config
        self._model = None
        self._attached.clear()


class _Streamer(StoppingCriteria):
    """Receives every generated token: emits its text, and stops generation at a stop string."""

    def __init__(self, stream: TextStream, stop_ids: frozenset[int], emit: Callable[[str], None]) -> None:
        self.stream = stream
        self._stop_ids = stop_ids
        self._emit = emit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        token_id = int(input_ids[0, -1])
        self._emit("" if token_id in self._stop_ids else self.stream.add(token_id))
        return torch.tensor([self.stream.stopped], device=input_ids.device)


def _generation_config(prompt: Prompt, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
    stop_ids = sorted(prompt.stop_ids)
    is_greedy = sampling.temperature < GREEDY_BELOW or sampling.top_p == 0.0
    choice: dict[str, Any] = {"do_sample": False}
    if not is_greedy:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        use_cache=True,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        max_new_tokens=max_new_tokens,
        **choice,
    )


def _is_plain_lora(config: Any) -> bool:
    """Whether PEFT can hold several such adapters on one base; it cannot with trained token rows."""
    return config.peft_type == PeftType.LORA and not config.trainable_token_indices
