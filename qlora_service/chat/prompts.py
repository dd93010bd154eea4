"""Prompts for generation: the same token ids that precede the answer in a training row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer

from qlora_service.data.rendering.stop_tokens import base_stop_ids, eos_token_id, template_end
from qlora_service.data.rendering.template_process import TemplateProcess
from qlora_service.data.rendering.tokenizer_settings import PLAIN_TEMPLATE, read_tokenizer_settings
from qlora_service.data.rendering.unknown_tokens import unknown_token
from qlora_service.data.rows.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel, InvalidRequest

MAX_TEMPLATE_PROCESSES = 4
"""Compiled chat templates in the cache, each in its own process"""
# A private-use character, without a meaning in tokenizers and templates.
_ANSWER = "\ue000"


@dataclass(frozen=True)
class Prompt:
    """The token ids to continue, and the token ids that end an answer."""

    ids: tuple[int, ...]
    stop_ids: frozenset[int]


class Prompts:
    """Prompts for one base model and its adapters. A context manager that ends its template processes."""

    def __init__(
        self,
        model_dir: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        embeddings: int | None = None,
    ) -> None:
        """`embeddings`: rows of the base's embedding; a prompt with a token beyond them is refused."""
        self._embeddings = embeddings
        settings = read_tokenizer_settings(model_dir)
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._clock = clock
        self._tokens = dict(settings.special_tokens)
        eos = eos_token_id(settings, self.tokenizer)
        if eos is not None:
            self._tokens["eos_token"] = self.tokenizer.id_to_token(eos) or ""
        self._tokens.setdefault("eos_token", "")
        self._stop_ids = base_stop_ids(settings, self.tokenizer)
        bos = self._token_id(self._tokens.get("bos_token"))
        bos = settings.bos_token_id if bos is None else bos
        if bos is not None:
            self._tokens.setdefault("bos_token", self.tokenizer.id_to_token(bos) or "")
        first_ids = list(self.tokenizer.encode("", add_special_tokens=True).ids[:1])
        self._bos_ids = first_ids if first_ids == [bos] else []
        plain_template = ("{{ bos_token }}" if self._bos_ids else "") + PLAIN_TEMPLATE
        self._template = settings.chat_template or plain_template
        self._processes: OrderedDict[tuple[str, object], TemplateProcess] = OrderedDict()

    def __enter__(self) -> Prompts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.__exit__(None, None, None)

    def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, template: str | None = None
    ) -> Prompt:
        """The prompt of a conversation; `template` is the chat template of an adapter that has its own.

        Renders the conversation with an answer appended, in the same way as a training row, and cuts the answer off.
        The prompt then equals the training prefix for every template.

        Raises:
            InvalidRequest: the chat template refuses the conversation, or the base has no embedding for a token of it.
            InvalidModel: the template is not usable.
        """
        answer = {"role": "assistant", "content": _ANSWER}
        trained = (*(False for _ in messages), True)
        chat = Chat((*messages, answer), trained, None if tools is None else tuple(tools))
        try:
            (rendered,) = self._process(template or self._template).render([chat])
        except InvalidDataset as error:
            raise InvalidRequest(error.message, location="messages") from None
        if rendered.error is not None:
            raise InvalidRequest(rendered.error, location="messages")
        if not rendered.spans:
            raise InvalidModel("the base model's chat template renders no answers: import the model with another one")
        start, end = rendered.spans[0][0], rendered.spans[-1][1]
        stop_ids = self._stop_ids | template_end(rendered.text[start:end], self.tokenizer)
        return Prompt(tuple(self._checked(self._ids(rendered.text[:start]), "messages")), stop_ids)

    def text(self, text: str) -> Prompt:
        """The prompt of plain text, as in training: the BOS token first, if the model uses one.

        Raises:
            InvalidRequest: the base has no embedding for a token of the text.
        """
        ids = self._checked(self._ids(text), "prompt")
        return Prompt(tuple(ids if ids[:1] == self._bos_ids else self._bos_ids + ids), self._stop_ids)

    def _process(self, template: str) -> TemplateProcess:
        """The process for the template at today's date, because a template may render the date."""
        now = self._clock()
        key = (template, now.date())
        if key not in self._processes:
            if len(self._processes) >= MAX_TEMPLATE_PROCESSES:
                _, oldest = self._processes.popitem(last=False)
                oldest.__exit__(None, None, None)
            self._processes[key] = TemplateProcess(template, self._tokens, now)
        self._processes.move_to_end(key)
        return self._processes[key]

    def _ids(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise InvalidModel(f"the base model's tokenizer.json cannot tokenize ({error})") from None
        return ids

    def _checked(self, ids: list[int], location: str) -> list[int]:
        """The ids. Raises: InvalidRequest, when one of them has no embedding."""
        if (problem := unknown_token(ids, self.tokenizer, self._embeddings)) is not None:
            raise InvalidRequest(problem, location=location)
        return ids

    def _token_id(self, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self.tokenizer.token_to_id(token)
        return token_id
