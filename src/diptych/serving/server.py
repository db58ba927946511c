"""Listening, and stopping so that what is being written is finished."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn

from diptych.models.base import UnifiedModel
from diptych.serving.app import build
from diptych.serving.guard import QuietHandler
from diptych.serving.scheduler import Scheduler
from diptych.serving.settings import Settings

KEEP_ALIVE_SECONDS = 15


class Server(uvicorn.Server):
    """Uvicorn's, which tells the scheduler of the signal that stops it."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.close()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # the second Ctrl-C does not wait
        self.should_exit = True


def serve(
    models: Mapping[str, UnifiedModel], settings: Settings, bound: socket.socket, *, grace_seconds: int = 60,
    ready: Callable[[Server], None] = lambda server: None,
) -> None:  # fmt: skip
    """Serves until a signal stops it (SIGINT, SIGTERM), then finishes what is being written, for `grace_seconds` at most.

    `bound`: a socket that listens (`listening.listen`). `ready` is called with the server before it begins.
    """
    scheduler = Scheduler(models, settings)
    config = uvicorn.Config(
        build(scheduler), log_config=None, access_log=False, server_header=False, lifespan="off", timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds, limit_concurrency=1000, h11_max_incomplete_event_size=2**16, proxy_headers=False,
        timeout_notify=30,
    )  # fmt: skip
    server = Server(config, scheduler)
    log_to_stderr(scheduler)
    scheduler.start()
    ready(server)
    try:
        server.run(sockets=[bound])
    finally:
        scheduler.end()
        bound.close()


def log_to_stderr(scheduler: Scheduler) -> None:
    """Lines of this package and warnings of the server, with the time before them."""
    handler = QuietHandler(scheduler.metrics)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("diptych.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.setLevel(level)
        log.propagate = False
        log.handlers = [handler]
