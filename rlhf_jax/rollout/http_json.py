"""JSON over HTTP with retries, for servers that may be busy, slow, broken or hostile."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from rlhf_jax.core.errors import UserError, shortened

MOST_BYTES = 1 << 28
"""Of an answer."""


@dataclasses.dataclass(frozen=True)
class HTTPOptions:
    """Client settings for a server.

    Attributes:
      url: where it listens, such as http://localhost:8000.
      model: the name that it serves.
      timeout: seconds for one attempt, from the first byte sent to the last one read.
      retries: more attempts after one that failed on the way or at the server.
      backoff: seconds before the first of them; doubled each time.
      prompts_per_request: prompts in one request.
      connections: requests at a time.
      api_key: sent as a bearer token; empty for none.
    """

    url: str
    model: str = "default"
    timeout: float = 600.0
    retries: int = 3
    backoff: float = 1.0
    prompts_per_request: int = 16
    connections: int = 8
    api_key: str = dataclasses.field(default="", repr=False)

    def at(self, path: str) -> str:
        """The address of a path of the server."""
        return self.url.rstrip("/") + path


class NoAnswer(UserError):
    """All attempts failed on the way or at the server; another request may succeed."""


def post_json(path: str, body: Mapping[str, Any], options: HTTPOptions) -> Any:
    """The JSON value that a server answers a POST with. Redirects are not followed.

    Raises:
      NoAnswer: none after all attempts.
      UserError: the server refuses.
    """
    url, data, problem = options.at(path), json.dumps(body).encode(), ""
    for attempt in range(options.retries + 1):
        try:
            status, answer = _exchange(url, data, options)
            if status == 200:
                return json.loads(answer) if answer.strip() else None
            problem = f"status {status}: {' '.join(answer[:500].decode(errors='replace').split())}"
            if status < 500 and status not in (408, 429):
                raise UserError(f"{url}: the server refuses ({problem}): mend the request or the address")
        # No connection, time-out, torn or malformed answer, one nested too deep.
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            problem = shortened(" ".join(str(error).split())) or type(error).__name__
        if attempt < options.retries:
            time.sleep(options.backoff * 2**attempt)
    raise NoAnswer(f"{url}: no answer in {options.retries + 1} attempts ({problem}): is the server up?")


def _exchange(url: str, data: bytes, options: HTTPOptions) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=options.timeout)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    try:
        connection.connect()
        # A time-out of sockets is for each read: a server that drips bytes would hold us for ever.
        watchdog = threading.Timer(options.timeout, _shut, (connection.sock,))
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request("POST", parts.path, data, headers)
            response = connection.getresponse()
            return response.status, _read(response)
        finally:
            late = not watchdog.is_alive()
            watchdog.cancel()
            if late:
                raise TimeoutError(f"no whole answer within {options.timeout:g} s")
    finally:
        connection.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse) -> bytes:
    parts, size = [], 0
    while part := response.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ValueError(f"an answer of more than {MOST_BYTES >> 20} MiB")
    if response.length:  # read(amount) does not mind an early end
        raise ValueError(f"an answer without its last {response.length} bytes")
    return b"".join(parts)
