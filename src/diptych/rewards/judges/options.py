"""What a recipe may say about a judge: where it is, and how patient to be with it."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from diptych.config import Config
from diptych.rewards.captions import AGAINST, Against


class JudgeOptions(Config):
    """Of one judge. No field holds a key: keys come from the environment.

    may_change: what says where the server is and how patient to be with it, not what it is asked.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "base_url", "api_key_env", "timeout_seconds", "concurrency", "retries", "backoff_seconds", "max_backoff_seconds",
            "breaker_failures", "probe_seconds", "wait_seconds", "cache_size", "cache_dir",
        }
    )  # fmt: skip
    base_url: str = Field(description="of the server, as in http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the name under which the server knows the model")
    revision: str | None = Field(None, min_length=1, description="which weights the server has, in your words, such as a commit of the hub")
    api_key_env: str | None = Field(None, description="the environment variable that holds the key; None: none is sent")
    timeout_seconds: float = Field(60.0, gt=0, description="for one try, from sending to the last byte of the reply")
    concurrency: int = Field(8, ge=1, description="requests at the same time")
    retries: int = Field(3, ge=0, description="after time-outs, connection errors, 429 and 5xx; never after an unusable reply")
    backoff_seconds: float = Field(0.5, ge=0, description="first pause; each next is twice as long, all times 0.5 to 1.5 at random")
    max_backoff_seconds: float = Field(30.0, ge=0, description="longest pause; where Retry-After asks for more there is no retry")
    breaker_failures: int = Field(8, ge=1, description="so many failed requests in a row: no more are sent until one finds the server back")
    probe_seconds: float = Field(10.0, ge=0, description="after so long one request may try whether the server is back")
    wait_seconds: float = Field(
        60.0, ge=0, description="so long, in all, the others wait for the server to be back before they fail at once; 0: not at all"
    )
    max_tokens: int = Field(1024, ge=1, description="of the reply; one that is cut off counts as unparsed")
    cache_size: int = Field(4096, ge=0, description="replies kept in memory")
    cache_dir: str | None = Field(None, description="a folder that keeps replies between runs; None: memory only")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="more fields of the request, as the server names them")

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address such as http://localhost:8000/v1 is needed")
        if parts.username or parts.password or parts.query:
            raise ValueError("no user, password or query may stand in the address; name a variable with api_key_env")
        return value

    @field_validator("extra_body")
    @classmethod
    def _check_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"model", "messages", "temperature", "max_tokens", "stream", "n"} & set(value))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set here")
        return value

    def api_key(self) -> str | None:
        """Raises ValueError where the named variable is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(f"api_key_env names {self.api_key_env}, which is not set in the environment; set it, or leave the option out")
        return key


class UnifiedRewardOptions(JudgeOptions):
    against: Against = Field("text", description=AGAINST)
    version: Literal["v1", "v2"] = Field(
        "v1", description="of the model: v1 gives one score (UnifiedReward, 1.5), v2 three, whose mean is taken (UnifiedReward 2.0)"
    )
