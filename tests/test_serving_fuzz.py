"""A small share of `tests/fuzz_serving.py`, for every day."""

from __future__ import annotations

import logging

from fuzz_serving import Listener, fuzz, schemathesis, wrong
from served import serving


def test_no_request_harms_the_server(tiny_model):
    """Statuses are below 500, errors have OpenAI's form, and the log has no failure."""
    listener = Listener()
    with serving({"m": tiny_model}, max_waiting=1000, max_body=2_000_000) as server:
        logging.getLogger("diptych.serving").addHandler(listener)
        try:
            statuses, problems = fuzz(server.port, 120, 5)
            result = schemathesis(server.url, 15, 5)
        finally:
            logging.getLogger("diptych.serving").removeHandler(listener)
        assert problems == []
        assert min(statuses[200], statuses[400]) >= 10
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
        assert server.scheduler.alive
    assert listener.heard == []


def test_what_is_wrong_is_seen():
    assert wrong(500, b"{}") == "status 500"
    assert wrong(400, b'{"error": {}}') == "another form"
    assert wrong(200, b"Traceback (most recent call last)") == "a traceback"
    assert wrong(200, b'data: {"error":{}}') == "an error in a stream"
