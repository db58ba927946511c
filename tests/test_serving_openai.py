"""The official client, unchanged: plain, streamed, async, images."""

from __future__ import annotations

import asyncio
import base64

import openai
import pytest
from served import drawing, serving

from diptych.pictures import open_image

STORY = "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple ."


@pytest.fixture(scope="module")
def server():
    models = {"base": drawing("storyboard"), "terse": drawing("storyboard_terse")}
    with serving(models, keys=("secret",)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def ask(**changes):
    return {"model": "base", "messages": [{"role": "user", "content": STORY}], "seed": 5, **changes}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "terse"]
    assert client.models.retrieve("terse").owned_by == "diptych"


def test_an_answer_of_texts_and_pictures(client):
    answer = client.chat.completions.create(**ask(), extra_body={"diptych": {"max_images": 2}})
    parts = answer.choices[0].message.content  # typed as a string: the client hands on what came
    assert [part["type"] for part in parts].count("image_url") == 2
    assert [open_image(part["image_url"]["url"]).size for part in parts if part["type"] == "image_url"] == [(96, 96)] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 18
    assert answer.model_extra["diptych"] == {"seed": 5}
    again = client.chat.completions.create(
        **ask(messages=[{"role": "user", "content": STORY}, {"role": "assistant", "content": parts}, {"role": "user", "content": STORY}]),
        extra_body={"diptych": {"form": "text"}},
    )
    assert isinstance(again.choices[0].message.content, str)
    assert again.usage.prompt_tokens > 2 * answer.usage.prompt_tokens


def test_a_stream(client):
    pieces = []
    for chunk in client.chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert choice.delta.content is None or isinstance(choice.delta.content, str)
            pieces += [choice.delta.content] if choice.delta.content else []
            pieces += [picture["image_url"]["url"] for picture in (choice.delta.model_extra or {}).get("images", [])]
    assert chunk.usage.completion_tokens_details.text_tokens > 0
    whole = client.chat.completions.create(**ask()).choices[0].message.content
    assert [piece for piece in pieces if piece.startswith("data:")] == [part["image_url"]["url"] for part in whole if "image_url" in part]
    assert "".join(piece for piece in pieces if not piece.startswith("data:")) == "".join(part.get("text", "") for part in whole)
    assert len(pieces) > len(whole)


def test_the_clients_own_helper_for_streams(client):
    """It adds up what it is told, and ends with a whole message."""
    with client.chat.completions.stream(**ask()) as stream:
        told = [event for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion().choices[0].message
    assert final.content == "".join(event.delta for event in told) != ""
    assert [picture["image_url"]["url"][:22] for picture in final.model_extra["images"]] == ["data:image/png;base64,"] * 4


def test_many_at_once(server):
    async def every() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            options = {"extra_body": {"diptych": {"form": "text"}}}
            asked = [client.chat.completions.create(**ask(seed=i, temperature=1.0), **options) for i in range(12)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            stream = await client.chat.completions.create(
                **ask(seed=3, temperature=1.0), stream=True, extra_body={"diptych": {"form": "text"}}
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    found = asyncio.run(every())
    assert asyncio.run(streamed()) == found[3]


def test_images(client):
    drawn = client.images.generate(model="base", prompt="draw this . a big orange tree , at the beach .", n=2, size="auto")
    assert [open_image(base64.b64decode(one.b64_json)).size for one in drawn.data] == [(96, 96)] * 2
    assert drawn.size == "96x96"


def test_errors_are_the_clients_own(server, client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ask(model="gpt-5"))
    assert (missing.value.code, missing.value.param, missing.value.type) == ("model_not_found", "model", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="stop"):
        client.chat.completions.create(**ask(), stop=["."])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
