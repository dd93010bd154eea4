"""What may be asked of a model on OpenAI's wire. What would change the answer and is not supported is refused."""

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

from api.v1.requests import Part, saying
from api.v1.schemas import TUNED_MODEL
from qlora_service.chat.wire import AdapterRef, GenerationRequest, Sampling
from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.conversation import OPENAI, read_tools, read_turns
from qlora_service.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1


def _only(what: str) -> WrapValidator:
    """One message for every value but the neutral one, which changes nothing."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("not_supported", f"{what}: leave it out") from None

    return WrapValidator(validate)


Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
Nothing = Annotated[JsonValue, Field(max_length=0)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_STOP_CHARS)]
Temperature = Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)]
NEUTRAL = "Takes its neutral value only."
IGNORED = "Accepted, and of no effect here."


class StreamOptions(Part):
    include_usage: StrictBool | None = Field(None, description="One more chunk, with the counts of tokens.")
    include_obfuscation: JsonValue = Field(None, description=IGNORED)


class _Asked(Part):
    """What both ways to ask share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=400)] = Field(
        description="A base model's name, a fine-tuned model's, or a succeeded job's id."
    )
    temperature: Temperature | None = Field(None, description="Default 1; 0 takes the likeliest token every time.")
    top_p: Share | None = Field(None, description="Default 1.")
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = Field(
        None, description="The same seed gives the same answer, on the same machine."
    )
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        saying(f"a text of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS} of them"),
    ] = Field(None, description="Text that ends the answer, and is not part of it.")
    stream: StrictBool | None = Field(None, description="Send the answer as it is generated.")
    stream_options: StreamOptions | None = None

    n: Annotated[Literal[1] | None, _only("one request gets one answer")] = Field(None, description=NEUTRAL)
    presence_penalty: Annotated[Zero | None, _only("penalties are not supported")] = Field(None, description=NEUTRAL)
    frequency_penalty: Annotated[Zero | None, _only("penalties are not supported")] = Field(None, description=NEUTRAL)
    logit_bias: Annotated[Annotated[dict[str, JsonValue], Field(max_length=0)] | None, _only("it is not supported")] = (
        Field(None, description=NEUTRAL)
    )
    user: JsonValue = Field(None, description=IGNORED)
    metadata: JsonValue = Field(None, description=IGNORED)
    store: JsonValue = Field(None, description="Accepted; nothing is stored.")
    service_tier: JsonValue = Field(None, description=IGNORED)
    safety_identifier: JsonValue = Field(None, description=IGNORED)
    prompt_cache_key: JsonValue = Field(None, description=IGNORED)
    prompt_cache_retention: JsonValue = Field(None, description=IGNORED)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
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


class ResponseFormat(Part):
    type: Literal["text"]


class CreateChatCompletion(_Asked):
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
        description="The conversation, as rows of a dataset have it; contents are text."
    )
    tools: list[dict[str, JsonValue]] | None = Field(None, description="Shown to the model by its chat template.")
    tool_choice: Annotated[
        Literal["none", "auto"] | None, _only("the model cannot be made to call a tool; it may with auto")
    ] = Field(None, description="none shows the model no tools.")
    parallel_tool_calls: JsonValue = Field(None, description=IGNORED)
    max_completion_tokens: Count | None = Field(None, description="Default: as many as the model has room for.")
    max_tokens: Count | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: Annotated[Literal[False] | None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    top_logprobs: Annotated[Literal[0] | None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    response_format: Annotated[ResponseFormat | None, _only("answers are plain text")] = Field(
        None, description=NEUTRAL
    )
    modalities: Annotated[list[Literal["text"]] | None, _only("answers are plain text")] = Field(
        None, description=NEUTRAL
    )
    reasoning_effort: Annotated[Literal["none"] | None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    verbosity: Annotated[Literal["medium"] | None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    prediction: JsonValue = Field(None, description=IGNORED)

    def request(self, adapter: AdapterRef | None) -> GenerationRequest:
        """What the model is to go on from. Raises: InvalidRequest."""
        with _located():
            # Answers that were given before are none to learn: they may be empty.
            unlearned = [
                message | {"weight": 0} if message.get("role") == "assistant" else message for message in self.messages
            ]
            messages = [message for message, _ in read_turns(unlearned, "/messages", OPENAI)]
            tools = None if self.tool_choice == "none" else read_tools({"tools": self.tools})
        return GenerationRequest(
            adapter=adapter,
            messages=messages,
            tools=None if tools is None else list(tools),
            sampling=self.sampling(self.max_completion_tokens or self.max_tokens),
        )


class CreateCompletion(_Asked):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": TUNED_MODEL, "prompt": "The capital of France is", "max_tokens": 16}]}
    )

    prompt: Annotated[
        Annotated[str, StringConstraints(strict=True)]
        | Annotated[list[Annotated[str, StringConstraints(strict=True)]], Field(min_length=1, max_length=1)],
        saying("one text, or a list of one: token ids and several prompts are not supported"),
        Field(description="Plain text to continue, without the chat template; or a list of one."),
    ]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="Default 16.")
    best_of: Annotated[Literal[1] | None, _only("one request gets one answer")] = Field(None, description=NEUTRAL)
    echo: Annotated[Literal[False] | None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    logprobs: Annotated[None, _only("it is not supported")] = Field(None, description=NEUTRAL)
    suffix: Annotated[None, _only("text cannot be filled in")] = Field(None, description=NEUTRAL)

    def request(self, adapter: AdapterRef | None) -> GenerationRequest:
        """What the model is to go on from."""
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return GenerationRequest(adapter=adapter, text=text, sampling=self.sampling(self.max_tokens or 16))


@contextmanager
def _located() -> Iterator[None]:
    """A problem of a row as one of the request."""
    try:
        yield
    except RowProblem as problem:
        place = problem.pointer or "/messages"
        raise InvalidRequest(f"{place}: {problem.reason}", location=place) from None
