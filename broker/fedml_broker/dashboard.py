# SPDX-License-Identifier: Apache-2.0
"""The dashboard's files: read once, served from memory, locked in by their headers.

The files under `web/` are what the browser runs: no build, nothing from elsewhere. The page names
them below a digest of them all, so that they may be cached for ever and never mixed with those of
another version. What they may do is said here: load from this broker only, no script or style
inside a page, no HTML made of text (Trusted Types), in nobody's frame.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aiohttp import hdrs, web

from fedml_broker.problems import Problem

_FOLDER = Path(__file__).parent / "web"
_DIGEST = b"@DIGEST@"
_PAGE = "index.html"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}

_CSP = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# For everything else: data, which no browser is to take for a page.
_CSP_OF_DATA = "default-src 'none'; frame-ancestors 'none'; sandbox"


@dataclass(frozen=True)
class _File:
    body: bytes
    type: str

    @cached_property
    def packed(self) -> bytes:
        return gzip.compress(self.body, mtime=0)


class Dashboard:
    """Answers with the page and its files."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in _TYPES}
        bodies = {name: path.read_bytes() for name, path in files.items()}
        digest = hashlib.sha256()
        for name, body in bodies.items():
            digest.update(f"{name}\0{len(body)}\0".encode() + body)
        self.digest = digest.hexdigest()[:16]
        bodies[_PAGE] = bodies[_PAGE].replace(_DIGEST, self.digest.encode())
        self._files = {
            name: _File(body, _TYPES[files[name].suffix]) for name, body in bodies.items()
        }

    def page(self, request: web.Request) -> web.Response:
        """The one page there is."""
        return self._answer(request, self._files[_PAGE], "no-cache")

    def file(self, request: web.Request, digest: str, name: str) -> web.Response:
        """One of its files.

        Raises:
            Problem: 404 no such file, or one of another version.
        """
        found = self._files.get(name)
        if found is None or digest != self.digest:
            raise Problem(404, "no such file", f"{digest[:40]}/{name[:40]}", hint="reload the page")
        return self._answer(request, found, "public, max-age=31536000, immutable")

    def _answer(self, request: web.Request, file: _File, caching: str) -> web.Response:
        headers = {
            hdrs.CACHE_CONTROL: caching,
            hdrs.ETAG: f'"{self.digest}"',
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
            "Content-Security-Policy": _CSP,
        }
        if request.headers.get(hdrs.IF_NONE_MATCH) == headers[hdrs.ETAG]:
            return web.Response(status=304, headers=headers)
        body = file.body
        if "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, ""):
            headers[hdrs.CONTENT_ENCODING] = "gzip"
            body = file.packed
        return web.Response(body=body, headers=headers, content_type=file.type, charset="utf-8")


async def guard(request: web.Request, response: web.StreamResponse) -> None:
    """Say of every answer what a browser may make of it; called before its head is sent."""
    headers = response.headers
    headers.setdefault("Content-Security-Policy", _CSP_OF_DATA)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    headers.setdefault("Cross-Origin-Opener-Policy", "same-origin")
    headers.setdefault("X-Frame-Options", "DENY")
