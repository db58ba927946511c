"""Reading a picture from an address on the net without being led to where its sender could not go himself.

The name is resolved once, every address that it has must be a public one, and the connection goes to just that address, so that no second
look-up leads elsewhere. The same is done at each redirection.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from typing import Any

REDIRECTIONS = 3
SECONDS = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(url: str, most_bytes: int, seconds: float = SECONDS) -> bytes:
    """The bytes at an http or https address. Raises ValueError saying why there are none."""
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTIONS + 1):
        found = _get(url, most_bytes, deadline)
        if isinstance(found, bytes):
            return found
        url = urllib.parse.urljoin(url, found)
    raise ValueError(f"the picture's address redirects more than {REDIRECTIONS} times")


def _get(url: str, most_bytes: int, deadline: float) -> bytes | str:
    """The bytes there, or where it redirects."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ValueError(f"the picture's address cannot be read: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("a picture's address begins with https:// or http:// and names a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a picture's address names no user")
    connection = _Connection(host, port, public_address(host, port), parts.scheme == "https", deadline)
    end = threading.Timer(max(0.0, deadline - time.monotonic()), connection.give_up)  # who sends a byte now and then is in time for each
    end.daemon = True
    end.start()
    try:
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "diptych", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and response.headers.get("Location"):
            return str(response.headers["Location"])
        if response.status != 200:
            raise ValueError(f"the picture's address answers with status {response.status}")
        found = _body(response, most_bytes)
        if time.monotonic() >= deadline:  # what was ended looks like an end
            raise TimeoutError
        return found
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise ValueError(f"the picture's address cannot be read: {type(error).__name__}") from error
    finally:
        end.cancel()
        connection.close()


def _body(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if size > most_bytes:
            raise ValueError(f"what stands at the picture's address has more than {most_bytes} bytes, the most that is read")
    return b"".join(pieces)


def public_address(host: str, port: int) -> Any:
    """The socket address of a host, (family, address). Raises ValueError where it has none, or one that is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError("the host of the picture's address is not known") from error
    for _, _, _, _, address in found:
        if not is_public(str(address[0])):
            raise ValueError("the picture's address is of a private network; public ones are read")
    family, _, _, _, address = found[0]
    return family, address


def is_public(address: str) -> bool:
    number = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None)
    return number.is_global and not number.is_multicast and (mapped is None or is_public(str(mapped)))


class _Connection(http.client.HTTPConnection):
    """To one address that was looked up before; by TLS in the host's name."""

    def __init__(self, host: str, port: int, address: Any, secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._address, self._secure, self._deadline = address, secure, deadline
        self.default_port = 443 if secure else 80  # it is left out of the Host header

    def connect(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the picture comes too slowly")
        family, address = self._address
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(left)
        self.sock.connect(address)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def give_up(self) -> None:
        """Ends what is being waited for, from another thread."""
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)
