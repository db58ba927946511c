"""The routes: chat completions, images, models, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from diptych.config import SamplingParams
from diptych.document import Document, Text
from diptych.forms import AnswerForm
from diptych.models.base import UnifiedModel
from diptych.serving import answers
from diptych.serving.answers import Completion, Usage
from diptych.serving.errors import APIError, invalid
from diptych.serving.guard import Guard
from diptych.serving.jobs import Accepted, Event, Failed, Finished, Gone, Job, Picture, Words
from diptych.serving.page import Page
from diptych.serving.pictures import prompt_of
from diptych.serving.protocol import ChatRequest, ImageRequest
from diptych.serving.protocol import Request as AnyRequest
from diptych.serving.scheduler import Scheduler

PATHS = ("/", "/v1/chat/completions", "/v1/images/generations", "/v1/models", "/health", "/metrics", "/openapi.json")
READERS = 2  # requests whose pictures are read, or written, at the same time
CHARACTERS_A_TOKEN = 64  # a longer text is over the context, whatever its words are


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorForm(BaseModel):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorForm, "description": about}
    for status, about in {
        400: "the request is wrong, or asks for what the model cannot do", 401: "no valid API key", 404: "no such model",
        408: "the request came too slowly", 413: "the request is too large", 422: "never sent: see 400", 429: "too many wait already",
        503: "the server is stopping", 504: "the answer took too long",
    }.items()
}  # fmt: skip


def build(scheduler: Scheduler) -> Guard:
    """The application around a scheduler that was started, or is by the time of the first request."""
    settings, models, metrics = scheduler.settings, scheduler.models, scheduler.metrics
    app = FastAPI(title="Diptych", version="1", docs_url=None, redoc_url=None, separate_input_output_schemas=False)
    desk = _Desk(scheduler)
    page = Page(models)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """A document, whole or as it is written (`stream`)."""
        return await desk.chat(asked, request)

    @app.post("/v1/images/generations", responses=ERRORS)
    async def images(asked: ImageRequest, request: Request) -> Response:
        """Pictures of a prompt."""
        return await desk.images(asked, request)

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [desk.describe(name) for name in models]}

    @app.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def one_model(name: str) -> dict[str, Any]:
        desk.model(name)
        return desk.describe(name)

    @app.get("/health", responses={503: {"description": "it is stopping, or its thread died"}})
    async def health() -> Response:
        well = scheduler.alive and not scheduler.closed
        return JSONResponse({"status": "ok" if well else "stopping" if scheduler.closed else "broken"}, 200 if well else 503)

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def tell_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return Response(page.html, media_type="text/html; charset=utf-8", headers=page.headers)

    @app.exception_handler(APIError)
    async def told(_: Request, error: APIError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        found = APIError(error.status_code, str(error.detail))
        if error.status_code == 400:  # FastAPI's: what Python's JSON cannot take (depth, digits, other bytes than UTF-8)
            found = invalid("the body is no valid JSON in UTF-8, or nested too deeply", code="invalid_json")
        if error.status_code in (404, 405):
            found.message = f"there is nothing at {request.method[:20]} {request.url.path[:100]}; /openapi.json lists what there is"
        return JSONResponse(found.body(), found.status, {**found.headers, **(error.headers or {})})

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        found = _first_of(error)
        return JSONResponse(found.body(), found.status)

    if settings.origins:
        headers = ["authorization", "content-type"]
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=headers)
    return Guard(app, settings, metrics, frozenset(PATHS))


def _first_of(error: RequestValidationError) -> APIError:
    """The first of pydantic's errors, as one of OpenAI's; where kinds of content are a choice, that of the kind which came furthest."""
    errors = error.errors()
    first = max(errors[:20], key=lambda one: len(one["loc"])) if len(errors[0]["loc"]) > 3 else errors[0]
    name = ".".join(str(step)[:60] for step in first["loc"] if step != "body" and str(step) != "str" and "[" not in str(step))
    if first["type"] == "json_invalid":
        return invalid(f"the body is no valid JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}", code="invalid_json")
    if not name and first["type"] != "value_error":
        return invalid("the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return invalid(f"{name!r} is not known, or not offered here", param=name, code="unknown_parameter")
    words = f"{name}: {first['msg']}".replace("Value error, ", "").removeprefix(": ")
    return invalid(words[:400], param=name or None, code="missing_parameter" if first["type"] == "missing" else "invalid_value")


class _Desk:
    """Requests to jobs, and what comes of them to answers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.settings = scheduler, scheduler.settings
        self.readers = asyncio.Semaphore(READERS)

    # --- models ---
    def model(self, name: str) -> UnifiedModel:
        found = self.scheduler.models.get(name)
        if found is None:
            known = ", ".join(self.scheduler.models)
            raise APIError(404, f"there is no model {name[:100]!r}; there are {known}", param="model", code="model_not_found")
        return found

    def describe(self, name: str) -> dict[str, Any]:
        model = self.scheduler.models[name]
        size = model.image_spec.pixel_size
        facts = {"family": model.family, "context": model.max_positions, "image_size": f"{size}x{size}"}
        return {"id": name, "object": "model", "created": 0, "owned_by": "diptych", "diptych": facts}

    # --- answers ---
    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        model = self.model(asked.model)
        most = CHARACTERS_A_TOKEN * model.max_positions
        if sum(_characters(message.content) for message in asked.messages) > most:
            raise invalid(
                f"the messages have more than {most} characters, which cannot fit the model's context of {model.max_positions}",
                param="messages", code="context_length_exceeded",
            )  # fmt: skip
        params = self._params(asked, model)
        async with self.readers:
            prompt = await asyncio.to_thread(prompt_of, asked.messages, self.settings)
        job = self._job(asked, prompt, asked.form, params, asked.text_limit, bool(asked.stream))
        if asked.stream:
            pieces = self._stream(job, request, bool(asked.stream_options and asked.stream_options.include_usage))
            await anext(pieces)  # what is refused before writing begins has a status of its own
            return _Stream(pieces)
        finished, usage = await self._whole(job, request)
        return await self._written(lambda: Completion(job).whole(finished, usage))

    async def images(self, asked: ImageRequest, request: Request) -> Response:
        model = self.model(asked.model)
        size = f"{model.image_spec.pixel_size}x{model.image_spec.pixel_size}"
        if asked.size not in (None, "auto", size):
            raise invalid(f"size is {asked.size!r}; the model draws {size}, which may also be left out, or auto", param="size")
        if asked.diptych.form not in (None, "image"):
            raise invalid(f"diptych.form is {asked.diptych.form}; here it is image, and may be left out", param="diptych.form")
        if not asked.prompt.strip():
            raise invalid("the prompt is empty", param="prompt")
        if len(asked.prompt) > CHARACTERS_A_TOKEN * model.max_positions:
            raise invalid("the prompt cannot fit the model's context", param="prompt", code="context_length_exceeded")
        params = self._params(asked, model)
        job = self._job(asked, Document((Text(asked.prompt),)), AnswerForm.IMAGE, params)
        finished, usage = await self._whole(job, request)
        return await self._written(lambda: answers.images(job, finished, usage))

    async def _written(self, make: Any) -> Response:
        """An answer as JSON; its pictures are packed in another thread."""
        async with self.readers:
            return Response(await asyncio.to_thread(lambda: answers.packed(make())), media_type="application/json")

    def _params(self, asked: AnyRequest, model: UnifiedModel) -> SamplingParams:
        """The release's settings with what the request names."""
        ours, release = asked.diptych, model.default_sampling
        if ours.max_text_tokens is not None and ours.max_text_tokens > model.max_positions:
            raise invalid(
                f"diptych.max_text_tokens is {ours.max_text_tokens}, and the model's context {model.max_positions}",
                param="diptych.max_text_tokens", code="context_length_exceeded",
            )  # fmt: skip
        words = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": ours.top_k}
        pictures = {**words, "guidance_scale": ours.guidance_scale, "image_guidance_scale": ours.image_guidance_scale}
        own = {"temperature": ours.image_temperature, "top_p": ours.image_top_p, "top_k": ours.image_top_k}
        pictures |= {name: value for name, value in own.items() if value is not None}
        update = {
            "text": release.text.model_copy(update={name: value for name, value in words.items() if value is not None}),
            "image": release.image.model_copy(update={name: value for name, value in pictures.items() if value is not None}),
            "max_text_tokens": ours.max_text_tokens or SamplingParams().max_text_tokens,
        }
        return release.model_copy(update=update)

    def _job(
        self,
        asked: AnyRequest,
        prompt: Document,
        form: AnswerForm | None,
        params: SamplingParams,
        limit: int | None = None,
        streams: bool = False,
    ) -> Job:
        count = asked.n or 1
        if count > self.settings.max_choices:
            raise invalid(f"n is {count}; the server writes at most {self.settings.max_choices} answers to a request", param="n")
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        return Job(asked.model, prompt, form, params, asked.diptych.max_images, limit, count, seed, streams)

    # --- waiting ---
    @contextlib.asynccontextmanager
    async def _watched(self, job: Job, request: Request) -> AsyncIterator[None]:
        """Inside, a client that leaves is one of the job's events; what is not written when it is over is dropped."""
        watch = asyncio.ensure_future(_left(job, request))
        try:
            yield
        finally:
            watch.cancel()
            self.scheduler.leave(job)

    async def _begin(self, job: Job, request: Request) -> Accepted:
        """Until writing begins. Raises APIError where it does not."""
        request.state.note |= {"model": job.model, "n": job.count, "seed": job.seed}
        self.scheduler.submit(job)
        event = await self._next(job)
        assert isinstance(event, Accepted)
        request.state.note["prompt_tokens"] = event.prompt_tokens
        return event

    async def _next(self, job: Job) -> Event:
        """Raises APIError where the job failed, or its time is over, and ConnectionResetError where the client left."""
        try:
            async with asyncio.timeout_at(job.arrived + self.settings.timeout_seconds):
                found = await job.events.get()
        except TimeoutError:
            seconds = self.settings.timeout_seconds
            raise APIError(504, f"the answer was not written within {seconds:g} s", code="timeout") from None
        if isinstance(found, Failed):
            raise found.error
        if isinstance(found, Gone):
            raise ConnectionResetError
        return found

    async def _whole(self, job: Job, request: Request) -> tuple[list[Finished], Usage]:
        finished: list[Finished] = []
        async with self._watched(job, request):
            usage = Usage((await self._begin(job, request)).prompt_tokens)
            while len(finished) < job.count:
                event = await self._next(job)
                if isinstance(event, Finished):
                    finished.append(event)
                    usage.add(event)
        _note(request, finished, usage)
        return finished, usage

    async def _stream(self, job: Job, request: Request, tells_usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events, behind an empty piece when writing begins. What goes wrong after that is told as one of them."""
        finished: list[Finished] = []
        drawn = [0] * job.count  # pictures of each choice
        pieces: list[bytes] = []  # that were not sent yet
        async with self._watched(job, request):
            completion, usage = Completion(job), Usage((await self._begin(job, request)).prompt_tokens)
            try:
                yield b""
                for choice in range(job.count):
                    yield completion.chunk(choice, {"role": "assistant", "content": ""})
                while len(finished) < job.count:
                    while len(finished) < job.count and not (pieces and job.events.empty()):  # what is there goes out together
                        event = await self._next(job)
                        if isinstance(event, Words):
                            pieces.append(completion.chunk(event.choice, {"content": event.text}))
                        elif isinstance(event, Picture):
                            part = await asyncio.to_thread(answers.picture_part, event.pixels)
                            pieces.append(completion.chunk(event.choice, {"images": [{"index": drawn[event.choice], **part}]}))
                            drawn[event.choice] += 1
                        elif isinstance(event, Finished):
                            finished.append(event)
                            usage.add(event)
                            pieces.append(completion.chunk(event.choice, {}, answers.reason(event)))
                    yield b"".join(pieces)
                    pieces = []
                if tells_usage:
                    yield completion.usage_chunk(usage)
                yield answers.DONE
            except APIError as error:
                request.state.note["end"] = error.code or "failed"
                yield b"".join([*pieces, answers.event(error.body())])
                yield answers.DONE
            finally:
                if len(finished) < job.count:
                    request.state.note.setdefault("end", "gone")
                _note(request, finished, usage)


class _Stream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__(pieces, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.pieces.aclose()


def _note(request: Request, finished: list[Finished], usage: Usage) -> None:
    note = request.state.note
    note |= {"text_tokens": usage.texts, "image_tokens": usage.images, "pictures": sum(len(one.document.images) for one in finished)}
    if finished:
        note.setdefault("end", "/".join(sorted({answers.reason(one) for one in finished})))


async def _left(job: Job, request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.events.put_nowait(Gone())


def _characters(content: str | list[Any]) -> int:
    return len(content) if isinstance(content, str) else sum(len(getattr(part, "text", "")) for part in content)
