"""The one client of all judges: limited, patient for a while, and never inventing an answer.

A request ends in a usable reply or in a cause:

| cause | what happened |
|---|---|
| `timeout` | no complete reply within `timeout_seconds`, after all retries |
| `connection` | no connection, or it broke, after all retries |
| `overloaded` | 429 or 5xx, after all retries |
| `rejected` | another HTTP error: wrong model, key or request |
| `breaker` | not asked, because the requests before failed, and the server was not back within `wait_seconds` |
| `refused` | the judge would not judge, or its filter stepped in |
| `unparsed` | no unambiguous verdict: wrong JSON, half an answer, two numbers |
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from diptych.rewards.judges.cache import ReplyCache
from diptych.rewards.judges.options import JudgeOptions
from diptych.rewards.judges.replies import UnusableReplyError

WHOLE = ("stop", "eos_token")  # how a reply ends that was not cut off
OF_ONE_REQUEST = (400, 413, 422)  # too long, too large, not understood: the server works, and takes the next one


@dataclasses.dataclass(frozen=True)
class Question:
    """`read`: raw values out of a reply, None for each that is out of range; raises UnusableReplyError."""

    messages: list[dict[str, Any]]
    read: Callable[[str], list[float | None]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """`values` are None where there is a `cause`. `reply` is what the judge said, if it said anything."""

    values: list[float | None] | None
    reply: str | None = None
    cause: str | None = None
    detail: str = ""


class RequestError(Exception):
    """`retry`: the same request may succeed later. `works`: the server answered, so this is no sign that it is gone."""

    def __init__(
        self, cause: str, detail: str, wait: float | None = None, retry: bool = False, reply: str | None = None, works: bool = False
    ) -> None:
        super().__init__(detail)
        self.cause, self.detail, self.wait, self.retry, self.reply, self.works = cause, detail, wait, retry, reply, works


class Breaker:
    """Opens after `failures` failed requests in a row; closes with the first that succeeds.

    While it is open one request may try the server every `probe_seconds`. That is worth waiting for until `wait_seconds` after it opened,
    unless the last failure was one that time does not mend, such as a wrong key.
    """

    def __init__(self, failures: int, probe_seconds: float, wait_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.probe_seconds, self.wait_seconds, self.clock = failures, probe_seconds, wait_seconds, clock
        self.failed, self.since, self.opened, self.passing = 0, 0.0, 0.0, True

    @property
    def is_open(self) -> bool:
        return self.failed >= self.limit

    @property
    def may_probe(self) -> bool:
        return self.until_probe <= 0

    @property
    def until_probe(self) -> float:
        return self.probe_seconds - (self.clock() - self.since)

    @property
    def worth_waiting(self) -> bool:
        return self.passing and 0 < self.since - self.opened + self.probe_seconds <= self.wait_seconds

    def record(self, success: bool, passing: bool = True) -> None:
        self.failed = 0 if success else self.failed + 1
        self.since, self.passing = self.clock(), passing
        if self.failed == self.limit:
            self.opened = self.since


class JudgeClient:
    """Breaker and memory live as long as the client; connections as long as one call of `ask`."""

    def __init__(self, options: JudgeOptions) -> None:
        """Raises ValueError where the client library or the key is missing."""
        try:
            import openai
        except ImportError as error:
            raise ValueError("rewards behind a server need the extra: pip install 'diptych[judges]'") from error
        self.openai, self.options = openai, options
        options.api_key()
        self.breaker = Breaker(options.breaker_failures, options.probe_seconds, options.wait_seconds)
        self.cache = ReplyCache(options.cache_size, options.cache_dir)

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer for each question, in order. Equal questions are asked once; no failure of the server raises."""
        weights = {"revision": self.options.revision} if self.options.revision else {}  # replies of others are not remembered
        keys = [self.cache.key(self._request(question) | weights) for question in questions]
        different = dict(zip(keys, questions, strict=True))
        answers = {key: self._remembered(key, question) for key, question in different.items()}
        missing = [key for key, answer in answers.items() if answer is None]
        if missing:
            key = self.options.api_key() or "none"  # the library wants one; servers without keys ignore it
            slots, probing = asyncio.Semaphore(self.options.concurrency), asyncio.Lock()
            async with self.openai.AsyncOpenAI(base_url=self.options.base_url, api_key=key, max_retries=0, timeout=None) as server:
                found = await asyncio.gather(*(self._answer(server, slots, probing, k, different[k]) for k in missing))
            answers |= dict(zip(missing, found, strict=True))
        return [answer for answer in (answers[key] for key in keys) if answer is not None]

    def _request(self, question: Question) -> dict[str, Any]:
        options = self.options
        settings = {"model": options.model, "temperature": 0, "max_tokens": options.max_tokens}
        return {**settings, "messages": question.messages, "extra_body": options.extra_body}

    def _remembered(self, key: str, question: Question) -> Answer | None:
        reply = self.cache.get(key)
        if reply is None:
            return None
        try:
            return Answer(question.read(reply), reply)
        except UnusableReplyError:  # kept by an earlier version that read more
            return None

    async def _answer(self, server: Any, slots: asyncio.Semaphore, probing: asyncio.Lock, key: str, question: Question) -> Answer:
        async with slots:
            try:
                reply = await self._ask(server, probing, question)
            except RequestError as error:
                return Answer(None, error.reply, error.cause, self._without_key(error.detail))
        try:
            values = question.read(reply)
        except UnusableReplyError as error:
            return Answer(None, reply, error.cause, error.detail)
        if None not in values:
            self.cache.put(key, reply)
        return Answer(values, reply)

    async def _ask(self, server: Any, probing: asyncio.Lock, question: Question) -> str:
        breaker = self.breaker
        if breaker.is_open:
            async with probing:  # one request tries the server; the others wait for what it finds
                while breaker.is_open:
                    if not breaker.may_probe:
                        if not breaker.worth_waiting:
                            raise RequestError("breaker", f"not asked: {breaker.failed} requests before failed")
                        await asyncio.sleep(breaker.until_probe)
                        continue
                    try:
                        return await self._recorded(server, question, retries=0)
                    except RequestError:
                        if not (breaker.is_open and breaker.worth_waiting):
                            raise
        return await self._recorded(server, question, retries=self.options.retries)

    async def _recorded(self, server: Any, question: Question, retries: int) -> str:
        try:
            reply = await self._with_retries(server, question, retries)
        except RequestError as error:
            self.breaker.record(success=error.works, passing=error.retry)
            raise
        self.breaker.record(success=True)
        return reply

    async def _with_retries(self, server: Any, question: Question, retries: int) -> str:
        pause = self.options.backoff_seconds
        for attempt in range(retries + 1):
            try:
                return await self._try(server, question)
            except RequestError as error:
                asked = error.wait or 0.0
                if not error.retry or attempt == retries or asked > self.options.max_backoff_seconds or self.breaker.is_open:
                    raise
                jittered = min(pause, self.options.max_backoff_seconds) * random.uniform(0.5, 1.5)  # not the training's randomness
                await asyncio.sleep(max(asked, jittered))
                pause *= 2
        raise AssertionError("unreachable")

    async def _try(self, server: Any, question: Question) -> str:
        openai = self.openai
        try:
            async with asyncio.timeout(self.options.timeout_seconds):
                response = await server.chat.completions.with_raw_response.create(**self._request(question))
        except (TimeoutError, openai.APITimeoutError):
            raise RequestError("timeout", f"no reply within {self.options.timeout_seconds:g} seconds", retry=True) from None
        except openai.APIConnectionError as error:
            raise RequestError("connection", f"{error} ({error.__cause__!r:.160})", retry=True) from None
        except openai.APIStatusError as error:
            status = error.status_code
            again, detail = status == 429 or status >= 500, f"HTTP {status}: {error.message[:200]}"
            cause, works = "overloaded" if again else "rejected", status in OF_ONE_REQUEST
            raise RequestError(cause, detail, _retry_after(error), retry=again, works=works) from None
        except openai.OpenAIError as error:
            raise RequestError("rejected", f"{type(error).__name__}: {error!s:.200}") from None
        return _content(response.content)

    def _without_key(self, text: str) -> str:
        key = self.options.api_key() if self.options.api_key_env else None
        return text.replace(key, "***") if key else text


def _content(body: bytes) -> str:
    """The text of a whole reply out of a chat completion. Raises RequestError."""
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise RequestError("unparsed", f"no chat completion: {body[:160]!r}", works=True) from None
    if refusal or finish == "content_filter":
        raise RequestError("refused", f"the judge refused: {str(refusal or finish)[:160]}", reply=str(refusal or content), works=True)
    if not isinstance(content, str):
        raise RequestError("unparsed", f"the reply holds no text: {content!r:.160}", works=True)
    if finish not in WHOLE:
        detail = f"the reply is not whole (finish_reason {finish!r}): {content[:160]!r}"
        raise RequestError("unparsed", detail, reply=content, works=True)
    return content


def _retry_after(error: Any) -> float | None:
    """Seconds; a date is ignored."""
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "")))
    except ValueError:
        return None
