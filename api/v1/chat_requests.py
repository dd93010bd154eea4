"""Request bodies of the completion endpoints. An unsupported parameter that would change the result is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from api.v1.requests import StrictModel, described_as
from api.v1.schemas import TUNED_MODEL
from qlora_service.chat.wire import AdapterRef, GenerationRequest, Sampling
from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import Note
from qlora_service.data.rows.conversation import OPENAI, read_turns
from qlora_service.data.rows.tools import read_tools
from qlora_service.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1


def _neutral_only(reason: str) -> WrapValidator:
    """Refuses every value but the neutral one, which changes nothing, with one message."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("not_supported", f"{reason}: leave it out") from None

    return WrapValidator(validate)


Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_STOP_CHARS)]
Temperature = Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
Probability = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
TokenCount = Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)]
NEUTRAL = "Only the neutral value is accepted."
IGNORED = "Accepted and ignored."


class StreamOptions(StrictModel):
    include_usage: StrictBool | None = Field(None, description="Send a last chunk with the token counts.")
    include_obfuscation: JsonValue = Field(None, description=IGNORED)


class _CompletionRequest(StrictModel):
    """The parameters that both completion endpoints share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=400)] = Field(
        description="The name of a base model or a fine-tuned model, or the id of a succeeded job."
    )
    temperature: Temperature | None = Field(None, description="Sampling temperature. Default 1; 0 is greedy decoding.")
    top_p: Probability | None = Field(
        None, description="Nucleus sampling: the share of probability mass to sample from. Default 1."
    )
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = Field(
        None, description="The same seed gives the same completion on the same machine."
    )
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        described_as(f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS} such strings"),
    ] = Field(None, description="A string that ends the completion and is not part of it, or a list of them.")
    stream: StrictBool | None = Field(None, description="Send the completion as server-sent events during generation.")
    stream_options: StreamOptions | None = None

    n: Annotated[Literal[1] | None, _neutral_only("a request returns one completion")] = Field(
        None, description=NEUTRAL
    )
    presence_penalty: Annotated[Zero | None, _neutral_only("penalties are not supported")] = Field(
        None, description=NEUTRAL
    )
    frequency_penalty: Annotated[Zero | None, _neutral_only("penalties are not supported")] = Field(
        None, description=NEUTRAL
    )
    logit_bias: Annotated[
        Annotated[dict[str, JsonValue], Field(max_length=0)] | None, _neutral_only("it is not supported")
    ] = Field(None, description=NEUTRAL)
    user: JsonValue = Field(None, description=IGNORED)
    metadata: JsonValue = Field(None, description=IGNORED)
    store: JsonValue = Field(None, description="Accepted and ignored: completions are not stored.")
    service_tier: JsonValue = Field(None, description=IGNORED)
    safety_identifier: JsonValue = Field(None, description=IGNORED)
    prompt_cache_key: JsonValue = Field(None, description=IGNORED)
    prompt_cache_retention: JsonValue = Field(None, description=IGNORED)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None) -> Sampling:
        stop = self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
        )


class ResponseFormat(StrictModel):
    type: Literal["text"]


class CreateChatCompletion(_CompletionRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": TUNED_MODEL,
                    "messages": [{"role": "user", "content": "Two pizzas and a coke, please."}],
                    "max_completion_tokens": 100,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1)] = Field(
        description="The conversation, in the format of dataset rows. Contents are text."
    )
    tools: list[dict[str, JsonValue]] | None = Field(
        None, description="Tool definitions, which the chat template shows to the model."
    )
    tool_choice: Annotated[
        Literal["none", "auto"] | None, _neutral_only("a tool call cannot be forced; with auto the model decides")
    ] = Field(None, description="`none` hides the tools from the model.")
    parallel_tool_calls: JsonValue = Field(None, description=IGNORED)
    max_completion_tokens: TokenCount | None = Field(
        None, description="Most tokens to generate. Default: as many as fit the context of the model."
    )
    max_tokens: TokenCount | None = Field(None, description="Deprecated name of `max_completion_tokens`.")
    logprobs: Annotated[Literal[False] | None, _neutral_only("it is not supported")] = Field(None, description=NEUTRAL)
    top_logprobs: Annotated[Literal[0] | None, _neutral_only("it is not supported")] = Field(None, description=NEUTRAL)
    response_format: Annotated[ResponseFormat | None, _neutral_only("completions are plain text")] = Field(
        None, description=NEUTRAL
    )
    modalities: Annotated[list[Literal["text"]] | None, _neutral_only("completions are plain text")] = Field(
        None, description=NEUTRAL
    )
    reasoning_effort: Annotated[Literal["none"] | None, _neutral_only("it is not supported")] = Field(
        None, description=NEUTRAL
    )
    verbosity: Annotated[Literal["medium"] | None, _neutral_only("it is not supported")] = Field(
        None, description=NEUTRAL
    )
    prediction: JsonValue = Field(None, description=IGNORED)

    def request(self, adapter: AdapterRef | None) -> GenerationRequest:
        """The request to the inference process. Raises: InvalidRequest."""
        with _as_invalid_request():
            # Weight 0 marks earlier replies as not trained on, so that they may be empty.
            untrained = [
                message | {"weight": 0} if message.get("role") == "assistant" else message for message in self.messages
            ]
            notes: list[Note] = []
            messages = [turn.message for turn in read_turns(untrained, "/messages", OPENAI, notes)]
            tools = None if self.tool_choice == "none" else read_tools({"tools": self.tools}, notes)
            for note in notes:  # a completion has no place for a warning
                raise RowProblem(note.pointer, note.reason)
        return GenerationRequest(
            adapter=adapter,
            messages=messages,
            tools=None if tools is None else list(tools),
            sampling=self.sampling(self.max_completion_tokens or self.max_tokens),
        )


class CreateCompletion(_CompletionRequest):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": TUNED_MODEL, "prompt": "The capital of France is", "max_tokens": 16}]}
    )

    prompt: Annotated[
        Annotated[str, StringConstraints(strict=True)]
        | Annotated[list[Annotated[str, StringConstraints(strict=True)]], Field(min_length=1, max_length=1)],
        described_as("one text, or a list of one: token ids and several prompts are not supported"),
        Field(description="Plain text to continue, without the chat template, or a list of one such text."),
    ]
    max_tokens: TokenCount | None = Field(None, description="Most tokens to generate. Default 16.")
    best_of: Annotated[Literal[1] | None, _neutral_only("a request returns one completion")] = Field(
        None, description=NEUTRAL
    )
    echo: Annotated[Literal[False] | None, _neutral_only("it is not supported")] = Field(None, description=NEUTRAL)
    logprobs: Annotated[None, _neutral_only("it is not supported")] = Field(None, description=NEUTRAL)
    suffix: Annotated[None, _neutral_only("fill-in-the-middle is not supported")] = Field(None, description=NEUTRAL)

    def request(self, adapter: AdapterRef | None) -> GenerationRequest:
        """The request to the inference process."""
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return GenerationRequest(adapter=adapter, text=text, sampling=self.sampling(self.max_tokens or 16))


@contextmanager
def _as_invalid_request() -> Iterator[None]:
    """Converts the problem of a dataset row into an error of the request."""
    try:
        yield
    except RowProblem as problem:
        location = problem.pointer or "/messages"
        raise InvalidRequest(f"{location}: {problem.reason}", location=location) from None
