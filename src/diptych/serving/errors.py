"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """What a client is told: a status, and `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error", 504: "timeout_error"}
        return named.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """400."""
    return APIError(400, message, param=param, code=code)
