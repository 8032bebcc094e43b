# SPDX-License-Identifier: Apache-2.0
"""Errors as the API says them: problem+json (RFC 9457), whatever went wrong.

A route raises `Problem`; the middleware `as_problems`, outermost in the application, turns it and
everything else that escapes into one shape of body:

    {"type": "about:blank", "title": "...", "status": 409, "detail": "...", "hint": "..."}

`detail` says what happened this time, `hint` what to do next. What we did not foresee is logged
under a reference, and only the reference leaves the machine.
"""

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

import msgspec
from aiohttp import hdrs, web

from fedml_protocol.errors import ProtocolError

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"

# Of an aiohttp exception, what still describes the answer once its body is replaced.
_BODY_HEADERS = frozenset({hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH})

# For the access log alone, as nginx writes it. The answer cannot be sent, but to raise would have
# aiohttp log a traceback for each connection that a client cuts.
_CLIENT_GONE = 499


class Problem(Exception):
    """A request that is answered with an error; raised anywhere below a route.

    Attributes:
        status: The HTTP status, 400 to 599.
        title: What kind of problem it is, the same words each time.
        detail: What happened this time.
        hint: What the person or the client can do next; may be empty.
        headers: More headers of the answer, such as ``Upload-Offset``.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        hint: str = "",
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{title}: {detail}" if detail else title)
        self.status = status
        self.title = title
        self.detail = detail
        self.hint = hint
        self.headers = dict(headers or {})

    def response(self) -> web.Response:
        """The answer: problem+json, never cached."""
        body = {"type": "about:blank", "title": self.title, "status": self.status}
        body |= {"detail": self.detail} if self.detail else {}
        body |= {"hint": self.hint} if self.hint else {}
        return web.Response(
            status=self.status,
            headers={hdrs.CACHE_CONTROL: "no-store"} | self.headers,
            content_type=CONTENT_TYPE,
            body=json.dumps(body, ensure_ascii=False).encode(),
        )


@web.middleware
async def as_problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer whatever escapes a route with problem+json."""
    try:
        return await handler(request)
    except Exception as error:
        if isinstance(error, ConnectionError) and _is_gone(request):
            log.debug("%s %s: %s", request.method, request.path, error)
            return web.Response(status=_CLIENT_GONE)
        if request.writer.output_size > 0:
            # Half an answer is out: a second head would be read as its body. Cutting the connection
            # is the one way left to say that the answer is not whole.
            log.exception("%s %s: failed in the middle of the answer", request.method, request.path)
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=_CLIENT_GONE)
        problem = _problem_of(error, request)
        if problem is None:
            raise
        return problem.response()


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _problem_of(error: Exception, request: web.Request) -> Problem | None:
    """What the client is told about `error`; None for redirects, which are no errors."""
    match error:
        case Problem():
            return error
        case web.HTTPException():
            return _from_aiohttp(error)
        case msgspec.MsgspecError():
            return Problem(
                400,
                "The body does not fit",
                str(error),
                "check the names and types of the fields against the API documentation",
            )
        case ProtocolError() if error.fault != "ours":
            return Problem(400, "The request is malformed", str(error))
    reference = secrets.token_hex(4)
    log.exception("%s %s failed [reference %s]", request.method, request.path, reference)
    return Problem(
        500,
        "The broker failed",
        f"reference {reference}",
        "this is the broker's fault: its log has the details under the reference",
    )


def _from_aiohttp(error: web.HTTPException) -> Problem | None:
    if error.status < 400:
        return None
    title = HTTPStatus(error.status).phrase
    text = error.text or ""
    # aiohttp's own text only repeats the status line.
    detail = "" if text == f"{error.status}: {error.reason}" else text
    headers = {name: value for name, value in error.headers.items() if name not in _BODY_HEADERS}
    return Problem(error.status, title, detail, headers=headers)
