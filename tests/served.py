"""A server in a thread, and models that draw of themselves."""

from __future__ import annotations

import contextlib
import threading
import time
import types
import urllib.request
from collections.abc import Iterator, Mapping

import torch

from diptych.listening import listen
from diptych.models import UnifiedModel, load_model
from diptych.serving.server import Server, serve
from diptych.serving.settings import Settings, own_hosts


def drawing(name: str, more: float = 1.0) -> UnifiedModel:
    """A packaged model that draws where it would end. Of itself it seldom does so before it is trained: here the token that begins a
    picture is `more` likelier (in its logit) than the one that ends the text."""
    model = load_model(name)
    plain = type(model).text_logits

    def text_logits(self, hidden):
        logits = plain(self, hidden).clone()
        begin, end = logits[..., self.image_spec.begin_id], logits[..., self.eos_id]
        logits[..., self.image_spec.begin_id] = torch.logaddexp(begin, end + more)
        return logits

    model.text_logits = types.MethodType(text_logits, model)  # type: ignore[method-assign]
    return model


@contextlib.contextmanager
def serving(models: Mapping[str, UnifiedModel], **settings) -> Iterator[types.SimpleNamespace]:
    """`.url`, `.port`, `.scheduler`; stopped at the end as by a signal."""
    bound = listen("127.0.0.1", 0)
    started: list[Server] = []
    options = Settings(**{"hosts": own_hosts("127.0.0.1"), **settings})
    thread = threading.Thread(target=serve, args=(models, options, bound), kwargs={"grace_seconds": 20, "ready": started.append})
    port = bound.getsockname()[1]
    thread.start()
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        time.sleep(0.05)
    try:
        yield types.SimpleNamespace(url=url, port=port, scheduler=started[0].scheduler, server=started[0])
    finally:
        started[0].scheduler.close()
        started[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not stop"
