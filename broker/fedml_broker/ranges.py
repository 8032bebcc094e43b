# SPDX-License-Identifier: Apache-2.0
"""What the headers of a blob request say: which bytes, on which condition (RFC 9110)."""

import re
from dataclasses import dataclass

from aiohttp import hdrs, web

from fedml_broker.problems import Problem

_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII | re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII | re.IGNORECASE)
_END_OF_UPLOAD = re.compile(r"bytes \*/(\d{1,18})", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AnnouncedBody:
    """What the head of a PUT says about its body.

    Attributes:
        start: Where the body begins; None: it is the whole blob.
        length: Of the body; None: not said.
        total: Of the blob; None: not said.
    """

    start: int | None
    length: int | None
    total: int | None


def requested_range(header: str | None, size: int) -> range | None:
    """The bytes that `Range` asks for (RFC 9110, section 14.2); None: all of them.

    Several ranges at once and units other than bytes get the whole, as a server may answer.

    Raises:
        Problem: 416, not a range or none within `size`.
    """
    if header is None or not header.lower().startswith("bytes=") or "," in header:
        return None
    found = _RANGE.fullmatch(header.replace(" ", ""))
    if found is not None:
        first, last, suffix = found.groups()
        if suffix is not None:
            part = range(max(0, size - int(suffix)), size)
        else:
            part = range(int(first), min(int(last) + 1 if last else size, size))
        if part:
            return part
    raise Problem(
        416,
        "No such range",
        f"{header[:80]!r} of a blob of {size} bytes",
        headers={hdrs.CONTENT_RANGE: f"bytes */{size}"},
    )


def announced_body(content_range: str | None, content_length: int | None) -> AnnouncedBody:
    """What the body of a PUT is to be (RFC 9110, section 14.4).

    Raises:
        Problem: 400, the headers make no sense or contradict each other.
    """
    if content_range is None:
        return AnnouncedBody(None, content_length, content_length)
    if (found := _END_OF_UPLOAD.fullmatch(content_range)) is not None:
        total = int(found[1])
        if not content_length:
            return AnnouncedBody(total, 0, total)
    elif (found := _CONTENT_RANGE.fullmatch(content_range)) is not None:
        first, last, total = map(int, found.groups())
        length = last + 1 - first
        if first <= last < total and content_length in (None, length):
            return AnnouncedBody(first, length, total)
    raise Problem(
        400,
        "Content-Range does not fit",
        f"{content_range[:80]!r} over a body of {content_length} bytes",
        "write `bytes FIRST-LAST/TOTAL`, counted from 0, LAST included",
    )


def precondition(request: web.Request, sha256: str) -> web.Response | None:
    """The answer where If-Match or If-None-Match already decides (RFC 9110, section 13.2.2)."""
    wanted, known = request.if_match, request.if_none_match
    if wanted is not None and not any(
        tag.value in (sha256, "*") and not tag.is_weak for tag in wanted
    ):
        raise Problem(412, "Another blob than expected", f"this one's ETag is {sha256}")
    if known is not None and any(tag.value in (sha256, "*") for tag in known):
        return web.Response(status=304, headers={hdrs.ETAG: f'"{sha256}"'})
    return None
