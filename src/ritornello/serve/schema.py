"""What may be asked for, as OpenAI's clients write it. Nothing is converted, and nothing unknown is passed over."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ritornello.config import ExitName
from ritornello.limits import LIMITS
from ritornello.serve.settings import MAX_FIELDS, MAX_GRAMMAR, MAX_IDS, MAX_STOP, MAX_STOPS, MAX_TEXTS


def bounds(name: str) -> Any:
    """Those of the table that Python and the command line obey too."""
    limit = LIMITS[name]
    low, above = (None, limit.low) if limit.open_low else (limit.low, None)
    return Field(ge=low, gt=above, le=limit.high)


def few(most: int = MAX_TEXTS) -> Any:
    """Of a list: as many, and of its faults the first: telling of each would take as long as a client likes."""
    return Field(min_length=1, max_length=most, fail_fast=True)


TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], few(MAX_IDS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Loops = Annotated[int, bounds("loops")]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"must have {MAX_FIELDS} fields at most")
        return data


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=200)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: Annotated[str, Field(max_length=10_000)] | None = None
    strict: bool | None = None  # it always is


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]


class Depth(Strict):
    """How deep: the same for a text and for a trace of it."""

    model: Annotated[str, Field(max_length=200)]
    loops: Loops | None = Field(None, description="Loops of each token, with `exit` the most; the model's own if null.")
    exit: ExitName | Literal["calibrated"] | None = Field(None, description="The rule by which a token may stop early.")
    exit_threshold: Annotated[float, bounds("exit_threshold")] | None = None
    min_loops: Loops | None = Field(None, description="With `exit`: no token stops before.")


class Wishes(Depth):
    """What both ways of asking have in common."""

    n: Annotated[int, bounds("n")] | None = None
    temperature: Annotated[float, bounds("temperature")] | None = None
    top_p: Annotated[float, bounds("top_p")] | None = None
    top_k: Annotated[int, bounds("top_k")] | None = None
    min_p: Annotated[float, bounds("min_p")] | None = None
    seed: Annotated[int, bounds("seed")] | None = Field(None, description="Another one each time if null.")
    frequency_penalty: Annotated[float, bounds("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, bounds("presence_penalty")] | None = None
    repetition_penalty: Annotated[float, bounds("repetition_penalty")] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, bounds("logit_bias")]], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)] | None = None
    loop_budget: Annotated[float, bounds("loop_budget")] | None = Field(
        None, description="Loops of a written token in the mean, at most."
    )
    draft_loops: Annotated[int, bounds("draft_loops")] | None = Field(
        None, description="So many loops guess, full depth decides: the same text."
    )
    draft_tokens: Annotated[int, bounds("draft_tokens")] | None = None
    loops_per_token: bool | None = Field(
        None, description="`usage.loops.per_token`, and in a stream a chunk per token."
    )
    user: Annotated[str, Field(max_length=1000)] | None = Field(None, description="Means nothing here.")


class CompletionBody(Wishes):
    prompt: str | Annotated[list[str], few()] | Tokens | Annotated[list[Tokens], few()]
    max_tokens: Annotated[int, Field(ge=0, le=LIMITS["max_tokens"].high)] | None = Field(
        None, description="16 if null; 0 with `echo`: the prompt alone is scored."
    )
    logprobs: Annotated[int, bounds("n_logprobs")] | None = None
    echo: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """Clients send an answer back with fields that hold nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TEXTS, fail_fast=True)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], few()]


class ChatBody(Wishes):
    messages: Messages
    max_tokens: Annotated[int, bounds("max_tokens")] | None = Field(None, description="What there is room for if null.")
    max_completion_tokens: Annotated[int, bounds("max_tokens")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, bounds("n_logprobs")] | None = None


class TraceBody(Depth):
    """Of a text that was written: what each loop would have answered."""

    prompt: str | Tokens | None = None
    messages: Messages | None = None
    completion: Annotated[Tokens, Field(description="Ids of its tokens.")]
    top: Annotated[int, bounds("n_logprobs")] = 5
