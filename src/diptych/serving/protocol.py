"""What clients send, in OpenAI's form, and what of it is ours: the object `diptych` (`extra_body` in the official client).

Fields of OpenAI's that would change the answer in a way that is not offered are known with their neutral values alone, so that clients
that always send them are answered, and everything else is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diptych.forms import AnswerForm

LARGEST = 2**31 - 1


def _temperature(value: float) -> float:
    if value != 0 and not 0.01 <= value <= 10:
        raise ValueError("0 (the most likely choice), or from 0.01 to 10")
    return value


Temperature = Annotated[float, Field(ge=0, le=10), AfterValidator(_temperature)]
TopP = Annotated[float, Field(ge=0.001, le=1)]
TopK = Annotated[int, Field(ge=0, le=LARGEST, description="0: off")]
Scale = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, description="the same seed gives the same document; left out: a random one")]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Name = Annotated[str, Field(max_length=200)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Form):
    type: Literal["text"]
    text: str


class Address(_Form):
    url: str = Field(description="data:image/...;base64,... (or https://..., where the server was started with --fetch-pictures)")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="without effect")


class PicturePart(_Form):
    type: Literal["image_url"]
    image_url: Address


Part = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: Name | None = Field(None, description="without effect")
    refusal: None = None


class Options(_Form):
    """Ours."""

    form: Literal["free", "image", "text", "text_image"] | None = Field(
        None, description="free: texts and pictures, as the model chooses; image: a picture; text; text_image: a text, then its picture"
    )
    guidance_scale: Scale | None = Field(None, description="classifier-free guidance; 1: off; left out: the model's own")
    image_guidance_scale: Scale | None = Field(None, description="three-way guidance: the weight of the pictures")
    max_images: Annotated[int, Field(ge=0, le=64)] | None = Field(None, description="left out: 4, or as many as fit the context")
    max_text_tokens: Count | None = Field(None, description="of each text; left out: 64")
    top_k: TopK | None = None
    image_temperature: Temperature | None = Field(None, description="left out: `temperature`")
    image_top_p: TopP | None = Field(None, description="left out: `top_p`")
    image_top_k: TopK | None = Field(None, description="left out: `top_k`")


class StreamOptions(_Form):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Form):
    type: Literal["text"]


class Request(_Form):
    """What both endpoints have."""

    model: Name
    n: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    seed: Seed | None = None
    temperature: Temperature | None = Field(None, description="left out: as the model's release samples")
    top_p: TopP | None = None
    diptych: Options = Options()
    user: Name | None = Field(None, description="without effect")


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = Field(None, description="text tokens of the whole answer; pictures do not count")
    max_completion_tokens: Count | None = Field(None, description="the same as max_tokens")
    # neutral values alone
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="without effect: there are no tools")
    modalities: list[Literal["text", "image"]] | None = Field(None, description="stands for a form: text, image, or both for free")
    # without effect
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    safety_identifier: Name | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def text_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _one_meaning(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one of them")
        if self.modalities is not None:
            form = {frozenset({"text"}): "text", frozenset({"image"}): "image"}.get(frozenset(self.modalities), "free")
            if self.diptych.form not in (None, form) or not self.modalities:
                raise ValueError(f"modalities ask for form {form}, and diptych.form is {self.diptych.form}; give one of them")
        return self

    @property
    def form(self) -> AnswerForm | None:
        """None: nothing was said of it, so it is free."""
        if self.modalities in (["text"], ["image"]):
            return AnswerForm(self.modalities[0])
        return None if self.diptych.form is None else AnswerForm(self.diptych.form)


class ImageRequest(Request):
    prompt: str = Field(min_length=1)
    size: Name | None = Field(None, description='"auto", or the size that the model draws, such as "96x96"')
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None
