"""What the page asks for, and the page itself. Nothing is written, and nothing is fetched from elsewhere."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from diptych.report.live.documents import Search
from diptych.report.live.folders import Run, Runs

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FILES = {"": ("page.html", "text/html; charset=utf-8"), "live.css": ("live.css", "text/css"), "live.js": ("live.js", "text/javascript"),
         "charts.js": ("charts.js", "text/javascript"), "groups.js": ("groups.js", "text/javascript")}  # fmt: skip
HERE = ("127.0.0.1", "localhost", "::1", "[::1]")


def show(folders: Sequence[Path], listening: socket.socket, host: str, ready: Callable[[], None]) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises ValueError where a folder does not exist. `ready` is called when all is."""
    # A page of elsewhere whose name leads here must not read what only this machine may: it is told by the name that it asks for.
    allowed = list(HERE) if host in HERE else ["*"]
    app = build(folders, allowed)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off"))
    ready()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def build(folders: Sequence[Path], allowed_hosts: Sequence[str] = ("*",)) -> FastAPI:
    """Raises ValueError where a folder does not exist."""
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no such folder: {', '.join(absent)}; give run folders (the output_dir of a training), or folders that hold some")
    runs = Runs(folders)
    app = FastAPI(title="Diptych runs", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    def named(run: str) -> Run:
        found = runs.all().get(run)
        if found is None:
            raise HTTPException(404, "no such run")
        return found

    @app.get("/api/runs")
    def listed() -> JSONResponse:
        return JSONResponse([run.summary() for run in runs.all().values()])

    @app.get("/api/series")
    def series(run: str, generation: str = "", step: Annotated[int, Query(ge=0)] = 0) -> JSONResponse:
        found = named(run)
        found.metrics.refresh()
        return JSONResponse(found.metrics.since(generation, step))

    @app.get("/api/documents")
    def documents(
        run: str,
        step: Annotated[int | None, Query(ge=0)] = None,
        before: Annotated[int | None, Query(ge=0)] = None,
        text: Annotated[str, Query(max_length=200)] = "",
        reward: Annotated[str, Query(max_length=200)] = "",
        low: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        high: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    ) -> JSONResponse:
        return JSONResponse(named(run).documents.find(Search(text, reward, low, high), step, before))

    @app.get("/settings")
    def settings(run: str) -> JSONResponse:
        return JSONResponse(named(run).settings())

    @app.get("/{name}")
    def page(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, "no such page")
        file, kind = FILES[name]
        return Response(resources.files("diptych.report.live").joinpath(file).read_bytes(), media_type=kind)

    app.add_api_route("/", lambda: page(""), methods=["GET"])
    return app


def address(listening: socket.socket, host: str) -> str:
    """What to open in a browser."""
    port: Any = listening.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"
