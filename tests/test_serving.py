"""The server, over HTTP: what it answers, and what it refuses in words."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib

import PIL.Image
import pytest
import torch
from served import drawing, serving

from diptych.document import Document, Image, Text
from diptych.forms import AnswerForm
from diptych.pictures import image_data_address, open_image
from diptych.runtime import generator
from diptych.sampling.engine import sample
from diptych.serving import fetching
from diptych.serving.guard import QuietHandler
from diptych.serving.settings import Settings, own_hosts, read_keys

STORY = "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple ."
PAINTED = PIL.Image.new("RGB", (96, 96), (30, 90, 200))


@pytest.fixture(scope="module")
def loaded():
    return drawing("storyboard")


@pytest.fixture(scope="module")
def server(loaded):
    with serving({"story": loaded}, max_batch=8, max_waiting=16, max_body=400_000, max_pixels=200_000, max_pictures=3) as found:
        yield found


def call(server, path, body=None, headers=None, method=None):
    """Status, headers and the answer: JSON where it is some."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method or ("GET" if body is None else "POST"), path, raw, {**kind, **(headers or {})})
    with contextlib.closing(connection):
        response = connection.getresponse()
        told = response.read()
        with contextlib.suppress(ValueError):
            told = json.loads(told)
        return response.status, dict(response.headers), told


def chat(content=STORY, **changes):
    return {"model": "story", "messages": [{"role": "user", "content": content}], "seed": 7, **changes}


def picture(url=None):
    return {"type": "image_url", "image_url": {"url": url or image_data_address(PAINTED)}}


def events(server, body):
    """Of a stream, with the seconds at which they came."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    while line := response.readline():
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield time.monotonic(), json.loads(line[6:])
    connection.close()


def document_of(parts):
    if isinstance(parts, str):
        return [parts]
    return [part["text"] if part["type"] == "text" else open_image(part["image_url"]["url"]).tobytes() for part in parts]


def alone(model, content, form=None, seed=7, count=1, **changes):
    """What `diptych generate` writes, as text and pixels."""
    row = model.encode_prompt(content if isinstance(content, Document) else Document((Text(content),)), form)
    params = model.default_sampling.model_copy(update=changes)
    found = sample(model, [row], params, num_generations=count, generator=generator(seed))
    return [
        [
            one.text if isinstance(one, Text) else one.pixels.tobytes()
            for one in rollout.document
            if not (isinstance(one, Text) and not one.text)
        ]
        for rollout in found
    ]


def warmer(model, temperature):
    """`temperature` as a request names it."""
    release = model.default_sampling
    both = {name: getattr(release, name).model_copy(update={"temperature": temperature}) for name in ("text", "image")}
    return both


# --- answers ---
def test_an_answer_is_what_generate_writes(server, loaded):
    status, _, told = call(server, "/v1/chat/completions", chat())
    assert status == 200
    assert (told["object"], told["model"], told["diptych"]) == ("chat.completion", "story", {"seed": 7})
    (choice,) = told["choices"]
    assert document_of(choice["message"]["content"]) == alone(loaded, STORY)[0]
    kinds = [part["type"] for part in choice["message"]["content"]]
    assert kinds.count("image_url") == 4
    usage = told["usage"]
    assert usage["completion_tokens_details"] == {"text_tokens": usage["completion_tokens"] - 4 * 9, "image_tokens": 4 * 9}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(loaded.encode_prompt(Document((Text(STORY),))))


@pytest.mark.parametrize("form", [None, "image", "text", "text_image"])
def test_a_stream_is_the_answer_in_pieces(server, loaded, form):
    options = {} if form is None else {"diptych": {"form": form}}
    whole = call(server, "/v1/chat/completions", chat(temperature=1, **options))[2]["choices"][0]
    pieces, ends, roles = [], [], 0
    for _, chunk in events(server, chat(temperature=1, stream_options={"include_usage": True}, **options)):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            roles += "role" in delta
            if delta.get("content"):
                pieces = (
                    [*pieces[:-1], pieces[-1] + delta["content"]] if pieces and isinstance(pieces[-1], str) else [*pieces, delta["content"]]
                )
            pieces += [open_image(part["image_url"]["url"]).tobytes() for part in delta.get("images", [])]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
        usage = chunk.get("usage", None)
    assert pieces == document_of(whole["message"]["content"])
    assert (ends, roles) == ([whole["finish_reason"]], 1)
    assert usage["completion_tokens"] > 0
    assert isinstance(whole["message"]["content"], str) == (form == "text")
    expected = alone(loaded, STORY, None if form is None else AnswerForm(form), **warmer(loaded, 1.0))[0]
    assert pieces == expected


def test_pictures_come_when_they_are_drawn_and_words_before_the_end(server):
    seconds = [(when, chunk["choices"][0]["delta"]) for when, chunk in events(server, chat()) if chunk["choices"]]
    first_words = next(when for when, delta in seconds if delta.get("content"))
    drawn = [when for when, delta in seconds if "images" in delta]
    assert first_words < drawn[-1]
    assert len(set(drawn)) == 4


def test_several_choices_are_the_documents_of_one_group(server, loaded):
    status, _, told = call(server, "/v1/chat/completions", chat(n=3, temperature=1.0))
    assert status == 200
    expected = alone(loaded, STORY, count=3, **warmer(loaded, 1.0))
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert [document_of(choice["message"]["content"]) for choice in told["choices"]] == expected
    assert len({json.dumps(choice["message"]) for choice in told["choices"]}) > 1
    found = [[], [], []]
    for _, chunk in events(server, chat(n=3, temperature=1.0)):
        for choice in chunk["choices"]:
            found[choice["index"]] += [open_image(p["image_url"]["url"]).tobytes() for p in choice["delta"].get("images", [])]
    assert found == [[part for part in document if isinstance(part, bytes)] for document in expected]


def test_requests_of_every_kind_at_once_are_as_alone(server, loaded):
    """More than fit the batch at once, with other seeds, forms and settings."""
    cases = []
    for i in range(10):
        form = [None, "text_image", "image", None][i % 4]
        cases.append({"seed": i, "temperature": [1.0, 0.0, 1.0][i % 3], "diptych": {"form": form} if form else {}})
    asked = [chat(STORY if i % 2 else "draw this . a big orange tree , at the beach .", **case) for i, case in enumerate(cases)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: call(server, "/v1/chat/completions", body), asked))
    assert {status for status, _, _ in answers} == {200}
    for body, case, (_, _, told) in zip(asked, cases, answers, strict=True):
        form = case["diptych"].get("form")
        settings = warmer(loaded, case["temperature"])
        expected = alone(loaded, body["messages"][0]["content"], None if form is None else AnswerForm(form), case["seed"], **settings)[0]
        assert document_of(told["choices"][0]["message"]["content"]) == expected


def test_a_prompt_brings_pictures_and_earlier_turns(server, loaded):
    turns = [
        {"role": "system", "content": "look"},
        {"role": "user", "content": [picture(), {"type": "text", "text": "tell the story ."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the ball grows ."}, picture()]},
        {"role": "user", "content": "first the ball leaves ."},
    ]
    status, _, told = call(server, "/v1/chat/completions", chat(messages=turns))
    assert status == 200
    words = ("tell the story .", "the ball grows .", "first the ball leaves .")
    prompt = (Text("look"), Image(PAINTED), Text(words[0]), Text(words[1]), Image(PAINTED), Text(words[2]))
    assert told["usage"]["prompt_tokens"] == len(loaded.encode_prompt(Document(prompt)))


def test_max_tokens_bounds_the_whole_answer(server):
    for name in ("max_tokens", "max_completion_tokens"):
        _, _, told = call(server, "/v1/chat/completions", chat("how do we build this ?", **{name: 2}, diptych={"form": "text"}))
        (choice,) = told["choices"]
        assert choice["finish_reason"] == "length"
        assert told["usage"]["completion_tokens"] == 2


def test_images(server, loaded):
    body = {"model": "story", "prompt": "draw this . a box .", "n": 2, "seed": 3, "size": "96x96", "temperature": 1.0}
    status, _, told = call(server, "/v1/images/generations", body)
    assert status == 200
    assert (told["size"], told["output_format"], told["usage"]["output_tokens"]) == ("96x96", "png", 18)
    drawn = [open_image(base64.b64decode(one["b64_json"])).tobytes() for one in told["data"]]
    assert drawn == [one[0] for one in alone(loaded, body["prompt"], AnswerForm.IMAGE, 3, 2, **warmer(loaded, 1.0))]


def test_models_health_metrics_and_the_page(server):
    status, _, told = call(server, "/v1/models")
    assert (status, [one["id"] for one in told["data"]]) == (200, ["story"])
    assert call(server, "/v1/models/story")[2]["diptych"] == {"family": "storyboard", "context": 512, "image_size": "96x96"}
    assert call(server, "/health")[::2] == (200, {"status": "ok"})
    call(server, "/v1/images/generations", {"model": "story", "prompt": "a box"})
    status, headers, text = call(server, "/metrics")
    assert headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(lines['diptych_pictures_total{model="story"}']) >= 1
    assert float(lines['diptych_requests_total{path="/v1/images/generations",status="200"}']) >= 1
    assert lines["diptych_running_documents"] == "0.0"
    status, headers, page = call(server, "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"://" not in page.replace(b"http://www.w3.org/2000/svg", b"")  # nothing from outside


# --- refusals ---
LONG = "the ball " * 300
REFUSED = [
    (400, "invalid_json", b"{", "no valid JSON"),
    (400, "invalid_json", b"[1]", "must be a JSON object"),
    (400, "invalid_json", b"[" * 100_000, ""),
    (400, "invalid_json", b'{"model": "\xff"}', ""),
    (400, "invalid_json", b'{"seed": ' + b"9" * 5000 + b"}", ""),
    (400, "missing_parameter", {"model": "story"}, "messages"),
    (400, "invalid_value", {"model": "story", "messages": []}, "messages"),
    (404, "model_not_found", chat(model="gpt"), "there are story"),
    (400, "unknown_parameter", chat(presence=1), "'presence'"),
    (400, "unknown_parameter", chat(diptych={"forms": "text"}), "'diptych.forms'"),
    (400, "invalid_value", chat(diptych={"form": "poem"}), "'text_image'"),
    (400, "invalid_value", chat(temperature=-1), "temperature"),
    (400, "invalid_value", chat(temperature=1e-300), "from 0.01"),
    (400, "invalid_value", chat(top_p=0), "top_p"),
    (400, "invalid_value", chat(n=0), "n"),
    (400, None, chat(n=9), "at most 8"),
    (400, "invalid_value", chat(n="2"), "n"),
    (400, "invalid_value", chat(seed=-1), "seed"),
    (400, "invalid_value", chat(seed=2**70), "seed"),
    (400, "invalid_value", chat(stop=["."]), "stop"),
    (400, "invalid_value", chat(logprobs=True), "logprobs"),
    (400, "invalid_value", chat(tools=[{}]), "tools"),
    (400, "invalid_value", chat(max_tokens=3, max_completion_tokens=4), "give one of them"),
    (400, "invalid_value", chat(modalities=["text"], diptych={"form": "image"}), "modalities"),
    (400, "context_length_exceeded", chat(LONG), "the model's context 512"),
    (400, "context_length_exceeded", chat("x" * 40_000), "more than 32768 characters"),
    (400, "context_length_exceeded", chat(diptych={"max_images": 60}), "lower max_images"),
    (400, "context_length_exceeded", chat(diptych={"max_text_tokens": 513}), "max_text_tokens"),
    (400, None, chat(" "), "empty"),
    (400, None, chat("a \ud800 b"), "lone surrogate"),
    (400, None, {**chat(), "messages": [{"role": "assistant", "content": "hm"}]}, "must be the user's"),
    (400, "invalid_value", {**chat(), "messages": [{"role": "tool", "content": "hm"}]}, "role"),
    (400, "invalid_value", chat([{"type": "audio"}]), "type"),
    (400, "invalid_image", chat([picture("data:image/png;base64,AAAA")]), "no picture"),
    (400, "invalid_image", chat([picture("data:image/png;base64,@@@")]), "base64"),
    (400, "invalid_image", chat([picture("data:text/plain,hi")]), "data address"),
    (400, "invalid_image", chat([picture("/etc/passwd")]), "address begins with"),
    (400, "invalid_image", chat([picture("file:///etc/passwd")]), "address begins with"),
    (400, "invalid_image_url", chat([picture("https://example.org/a.png")]), "--fetch-pictures"),
    (400, None, chat([picture()] * 4), "more than 3 pictures"),
    (400, "image_too_large", chat([picture(image_data_address(PIL.Image.new("RGB", (500, 500))))]), "200000"),
    (413, "request_too_large", b"x" * 500_000, "400000 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "body", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_told(server, status, code, body, said):
    for streams in (False, True) if isinstance(body, dict) else (False,):
        asked = {**body, "stream": streams} if isinstance(body, dict) else body
        found, headers, told = call(server, "/v1/chat/completions", asked)
        assert (found, told["error"]["code"]) == (status, code), told
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert told["error"]["type"] == "invalid_request_error"
        assert said in told["error"]["message"]
        assert headers["x-request-id"]
    assert call(server, "/health")[0] == 200


def bomb() -> str:
    """A PNG of 50000 x 50000 pixels in few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10**7)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def test_a_decompression_bomb_is_not_opened(server):
    status, _, told = call(server, "/v1/chat/completions", chat([picture(bomb())]))
    assert status == 400
    assert told["error"]["code"] in ("image_too_large", "invalid_image")


def test_images_refuse(server):
    plain = {"model": "story", "prompt": "a box"}
    for change, said in (
        ({"size": "1024x1024"}, "96x96"), ({"response_format": "url"}, "b64_json"), ({"prompt": " "}, "empty"), ({"n": 9}, "at most 8"),
        ({"diptych": {"form": "text"}}, "image"), ({"prompt": LONG}, "context"), ({"prompt": "x" * 99_999}, "context"),
    ):  # fmt: skip
        status, _, told = call(server, "/v1/images/generations", {**plain, **change})
        assert (status, said in told["error"]["message"]) == (400, True), told


def test_other_paths_methods_and_kinds(server):
    assert call(server, "/v1/nothing")[2]["error"]["message"].startswith("there is nothing at GET /v1/nothing")
    assert call(server, "/v1/chat/completions", method="DELETE")[0] == 405
    assert call(server, "/v1/models/none")[2]["error"]["code"] == "model_not_found"
    body = json.dumps(chat()).encode()
    assert call(server, "/v1/chat/completions", body, {"Content-Type": "text/plain"})[0] == 400  # what a foreign page may send unasked


# --- load, and clients that vanish ---
def test_a_full_line_is_told(loaded):
    with serving({"story": loaded}, max_batch=1, max_choices=1, max_waiting=1) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: call(server, "/v1/chat/completions", chat(seed=i)), range(8)))
        refused = [(headers, told) for status, headers, told in answers if status == 429]
        assert 4 <= len(refused) <= 7
        assert all(status in (200, 429) for status, _, _ in answers)
        for headers, told in refused:
            assert int(headers["retry-after"]) >= 1
            assert told["error"]["type"] == "rate_limit_error"
        assert call(server, "/v1/chat/completions", chat())[0] == 200


@pytest.fixture
def slowly(loaded, monkeypatch):
    plain = loaded.text_logits
    monkeypatch.setattr(loaded, "text_logits", lambda hidden: (time.sleep(0.05), plain(hidden))[1])
    return loaded


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_frees_his_place(slowly, streams):
    with serving({"story": slowly}, max_batch=2, max_choices=2) as server:
        gone = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps(chat(n=2, stream=streams, diptych={"max_text_tokens": 60})).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.scheduler.num_running == 2)
        gone.close()
        until(lambda: server.scheduler.num_running == 0, 10)
        assert server.scheduler.metrics.registry.get_sample_value("diptych_documents_total", {"model": "story", "end": "stop"}) is None


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_what_takes_too_long_is_ended(slowly):
    with serving({"story": slowly}, timeout_seconds=0.3) as server:
        status, _, told = call(server, "/v1/chat/completions", chat())
        assert (status, told["error"]["code"]) == (504, "timeout")
        until(lambda: server.scheduler.num_running == 0)
        found = [chunk for _, chunk in events(server, chat())]
        assert found[-1]["error"]["code"] == "timeout"
        until(lambda: server.scheduler.num_running == 0)


def test_a_request_that_does_not_come_is_given_up(loaded):
    with serving({"story": loaded}, body_seconds=0.3) as server:
        asking = socket.create_connection(("127.0.0.1", server.port))
        asking.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in asking.recv(4096)
        asking.close()


def test_a_stop_finishes_what_is_being_written_and_refuses_the_rest(slowly):
    with concurrent.futures.ThreadPoolExecutor(2) as pool, serving({"story": slowly}, max_batch=1, max_choices=1) as server:
        first = pool.submit(call, server, "/v1/chat/completions", chat())
        until(lambda: server.scheduler.num_running == 1)
        second = pool.submit(call, server, "/v1/chat/completions", chat())
        until(lambda: server.scheduler.num_waiting == 1)
        server.scheduler.close()
        status, headers, told = second.result()
        assert (status, told["error"]["code"], headers["retry-after"]) == (503, "stopping", "10")
        assert call(server, "/health")[0] == 503
        assert call(server, "/v1/chat/completions", chat())[0] == 503
        server.server.should_exit = True
        assert first.result()[0] == 200


def test_a_failure_of_the_model_is_told_and_the_server_goes_on(loaded, monkeypatch):
    plain = loaded.image_step
    with serving({"story": loaded}) as server:
        monkeypatch.setattr(loaded, "image_step", lambda *given: 1 / 0)
        status, _, told = call(server, "/v1/chat/completions", chat())
        assert (status, told["error"]["type"]) == (500, "server_error")
        assert "zero" not in json.dumps(told)
        monkeypatch.setattr(loaded, "image_step", lambda *given: plain(*given) * torch.nan)
        status, _, told = call(server, "/v1/chat/completions", chat())
        assert (status, "not finite" in told["error"]["message"]) == (500, True)
        monkeypatch.setattr(loaded, "image_step", plain)
        assert call(server, "/v1/chat/completions", chat())[0] == 200


# --- who may ---
def test_keys(loaded):
    with serving({"story": loaded}, keys=("one", "two")) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            status, headers, told = call(server, path)
            assert (status, told["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert call(server, "/v1/models", headers={"Authorization": "Bearer three"})[0] == 401
        assert call(server, "/v1/models", headers={"Authorization": "Basic two"})[0] == 401
        assert call(server, "/v1/models", headers={"Authorization": "Bearer two"})[0] == 200
        assert [call(server, path)[0] for path in ("/", "/health")] == [200, 200]


def test_foreign_names_and_pages(loaded):
    with serving({"story": loaded}, origins=("https://good.example",)) as server:
        assert call(server, "/v1/models", headers={"Host": "evil.example"})[0] == 403
        assert call(server, "/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200
        good = call(server, "/v1/models", headers={"Origin": "https://good.example"})[1]
        assert good["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-origin" not in call(server, "/v1/models", headers={"Origin": "https://evil.example"})[1]
    with serving({"story": loaded}) as server:
        assert "access-control-allow-origin" not in call(server, "/v1/models", headers={"Origin": "https://good.example"})[1]


def test_keys_are_read_from_a_file_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("abc\n\n def \n")
    monkeypatch.setenv("DIPTYCH_API_KEYS", "ghi, jkl")
    assert read_keys(tmp_path / "keys") == ("abc", "def", "ghi", "jkl")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(tmp_path / "keys")
    monkeypatch.setenv("DIPTYCH_API_KEYS", "ü")
    with pytest.raises(ValueError, match="API key 1"):
        read_keys(None)


def test_settings_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="could never be answered"):
        Settings(max_batch=2)
    with pytest.raises(ValueError, match="must be more than 0"):
        Settings(timeout_seconds=0)
    assert own_hosts("0.0.0.0") is None
    assert "localhost" in own_hosts("::1")


# --- pictures from outside ---
@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "fc00::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "100.64.0.1"],
)  # fmt: skip
def test_private_addresses_are_not_read(address):
    assert not fetching.is_public(address)


def test_public_addresses_are():
    assert all(map(fetching.is_public, ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")))


class _Files:
    """A server of one picture, redirections and other answers, at a private address that is taken for a public one."""

    def __init__(self, answers):
        self.answers, self.socket = answers, socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                asking, _ = self.socket.accept()
                path = asking.recv(4096).split(b" ")[1].decode()
                answer = self.answers[path]
                for piece in answer if isinstance(answer, list) else [answer]:
                    with contextlib.suppress(OSError):
                        asking.sendall(piece)
                    time.sleep(0.0 if len(answer) == 1 or not isinstance(answer, list) else 0.2)
                asking.close()


def test_pictures_at_addresses_are_read_where_that_is_allowed(loaded, monkeypatch):
    buffer = io.BytesIO()
    PAINTED.save(buffer, "PNG")
    raw = buffer.getvalue()
    ok, moved = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 No\r\nLocation: "
    files = _Files(
        {
            "/a.png": ok + b"Content-Length: %d\r\n\r\n" % len(raw) + raw,
            "/there": moved + b"/a.png\r\n\r\n",
            "/round": moved + b"/round\r\n\r\n",
            "/inside": moved + b"http://10.0.0.1/\r\n\r\n",
            "/none": b"HTTP/1.1 404 No\r\n\r\n",
            "/large": ok + b"\r\n" + b"x" * 500_000,
            "/drip": [ok] + [b"x"] * 30,
        }
    )
    base = f"http://127.0.0.1:{files.port}"
    with serving({"story": loaded}, fetch_pictures=True, max_body=400_000) as server:
        told = call(server, "/v1/chat/completions", chat([picture(f"{base}/a.png")]))[2]
        assert told["error"]["message"] == "the picture's address is of a private network; public ones are read"
        plain = fetching.is_public
        monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or plain(address))
        monkeypatch.setattr(fetching.fetch, "__defaults__", (0.7,))
        refused = {
            "/round": "redirects more than", "/none": "status 404", "/large": "more than 400000 bytes", "/inside": "private network",
            "/drip": "cannot be read",
        }  # fmt: skip
        for path in ("/a.png", "/there"):
            content = [picture(base + path), {"type": "text", "text": "tell the story ."}]
            told = call(server, "/v1/chat/completions", chat(content))[2]
            assert (
                document_of(told["choices"][0]["message"]["content"])
                == alone(loaded, Document((Image(PAINTED), Text("tell the story ."))))[0]
            )
        for path, said in refused.items():
            began = time.monotonic()
            status, _, told = call(server, "/v1/chat/completions", chat([picture(base + path)]))
            assert (status, said in told["error"]["message"]) == (400, True), told
            assert time.monotonic() - began < 3
        for address in ("http://user:pass@127.0.0.1/", "http:///x", "http://127.0.0.1:99999/", "ftp://127.0.0.1/"):
            assert call(server, "/v1/chat/completions", chat([picture(address)]))[0] == 400


# --- the log ---
def test_one_line_of_log_for_each_request(server, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diptych.serving"), "propagate", True)
    caplog.set_level(logging.INFO)
    call(server, "/v1/chat/completions", chat(max_tokens=2, diptych={"form": "text"}))
    call(server, "/a%0Ab%1b")

    def of_ours() -> list[str]:
        lines = [record.getMessage() for record in dict.fromkeys(caplog.records)]
        return [line for line in lines if '"/health"' not in line]  # asked by the fixture; its line may come late

    until(lambda: len(of_ours()) >= 2)
    lines = of_ours()
    assert len(lines) == 2
    assert '127.0.0.1 POST "/v1/chat/completions" 200' in lines[0]
    assert 'model="story" n=1 seed=7' in lines[0]
    assert 'end="length"' in lines[0]
    assert STORY not in lines[0]
    assert "\n" not in lines[1]
    assert '"/a\\nb\\u001b" 404' in lines[1]


def test_a_log_that_cannot_be_written_stops_nothing(server, capsys):
    with open("/dev/full", "w") as full:
        handler = QuietHandler(server.scheduler.metrics, full)
        log = logging.getLogger("diptych.serving")
        log.addHandler(handler)
        try:
            assert call(server, "/v1/chat/completions", chat(max_tokens=1, diptych={"form": "text"}))[0] == 200
            assert call(server, "/health")[0] == 200
        finally:
            log.removeHandler(handler)
            handler.stream = None
        with contextlib.suppress(OSError):
            full.close()
    lost = server.scheduler.metrics.registry.get_sample_value("diptych_lost_log_lines_total")
    assert lost >= 1
