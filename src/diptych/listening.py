"""A socket to serve at, or why there is none."""

from __future__ import annotations

import errno
import os
import socket

BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 is a free one.

    Raises ValueError where the address is in use, needs rights, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    if os.name != "nt":
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        reasons = {
            errno.EADDRINUSE: "something listens there already: give another --port, or 0 for a free one",
            errno.EACCES: "it takes rights that you do not have; ports from 1024 on are free to all",
            errno.EADDRNOTAVAIL: "the address is not one of this machine's; 127.0.0.1 is this machine alone, 0.0.0.0 all its addresses",
        }
        raise ValueError(f"cannot listen at {host}:{port}: {reasons.get(error.errno or 0, str(error))}") from error
    return found
