"""What goes to a check and what comes back.

A request is a line of JSON with descriptors in its wake. The event pipe has one JSON record per line, with its seal, written by the
process that was started for the check and by no fork of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
from collections.abc import Sequence
from typing import Any


def ask(control: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """Send the request for a check with its descriptors (events, output, trace); raises OSError if nobody takes it."""
    line = json.dumps({"request": request}).encode() + b"\n"
    socket.send_fds(control, [line[:1]], fds)
    control.sendall(line[1:])


def seal(nonce: str, text: str, _hash: Any = hashlib.blake2b) -> str:
    """The seal of a record, a keyed BLAKE2b (RFC 7693): only who knows the nonce of this check can make it."""
    return _hash(text.encode(), key=nonce.encode(), digest_size=32).hexdigest()


class Channel:
    """Writes events to a file descriptor; a learner's `os.fork()` inherits it and stays silent."""

    def __init__(self, fd: int, nonce: str) -> None:
        pid, count, write, getpid, make = os.getpid(), 0, os.write, os.getpid, seal
        encode = json.JSONEncoder(default=str).encode

        def send(kind: str, /, **data: Any) -> None:
            nonlocal count
            if getpid() != pid:
                return
            text = encode({"n": count, "event": kind, **data})
            count += 1
            line = f"{make(nonce, text)} {text}\n".encode()
            while line:
                line = line[write(fd, line) :]

        self.send = send


def parse(line: bytes, nonce: str, expected: int) -> dict[str, Any] | None:
    """The event of one line, or None if it is not the next sealed record of this check."""
    try:
        found, _, text = line.decode().partition(" ")
        if not hmac.compare_digest(found, seal(nonce, text)):
            return None
        event = json.loads(text)
    except (ValueError, TypeError):
        return None
    return event if event.get("n") == expected else None
