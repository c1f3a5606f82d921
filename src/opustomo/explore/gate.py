"""Who is let in: pure rules on the headers of a request, before anything else is looked at.

Owns: the token, and what a page of somebody else, a rebound name or a malformed request gets.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import SplitResult, urlsplit

LOOPBACK = "127.0.0.1"
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
SMALL, LARGE = 1 << 16, 1 << 26  # bytes of a body: of a question, of a selection (16 million particles)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that gets no answer but a status and one line."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def cookie_name(token: str) -> str:
    """Of its own for every server: browsers keep one jar for all ports of a machine."""
    return "opustomo_" + hashlib.sha256(token.encode()).hexdigest()[:12]


def admit(method: str, target: str, headers: Mapping[str, str], token: str, offered: str) -> SplitResult:
    """The address asked for.  Raises Refused unless it is ours and comes from our page, or from a person with a link.

    headers: by lower-case name; offered: the token in the address, "" where there is none.
    """
    if method not in ("GET", "POST"):
        raise Refused(405, f"{method} is not answered here; GET and POST are")
    address = split(target)
    _host(headers.get("host", ""))
    entering = method == "GET" and address.path == "/" and bool(offered)
    _origin(headers, entering)
    if not hmac.compare_digest((offered or kept(headers, token)).encode(), token.encode()):
        raise Refused(403, "a wrong token, or none; open the link that `opustomo explore` printed")
    return address


def split(target: str) -> SplitResult:
    """A request target as its parts; Refused where it is not one of a page."""
    try:
        if not target.startswith("/") or target.startswith("//") or not target.isascii():
            raise ValueError
        return urlsplit(target)
    except ValueError:
        raise Refused(400, "this is no address of a page") from None


def _host(host: str) -> None:
    """Any port: a tunnel may have another one on the user's side.  Another name may have been rebound to us."""
    if not HOST.fullmatch(host.lower()):
        raise Refused(403, f"this server is for {LOOPBACK} and localhost alone; tunnel to it with ssh -L")


def _origin(headers: Mapping[str, str], entering: bool) -> None:
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if entering and origin is None and headers.get("sec-fetch-mode", "navigate") == "navigate":
        return
    if origin is not None and origin != f"http://{headers.get('host')}":
        raise Refused(403, "asked for by another page")
    if site not in (None, "same-origin", "none"):
        raise Refused(403, "asked for by another site")


def kept(headers: Mapping[str, str], token: str) -> str:
    """The token in the cookie; "" without it."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(cookie_name(token))
    except CookieError:
        found = None
    return found.value if found is not None else ""


def body_size(headers: Mapping[str, str], most: int) -> int:
    """Bytes that follow a POST; Refused where that is not stated, or more than ``most``."""
    stated = headers.get("content-length")
    if "transfer-encoding" in headers or stated is None:
        raise Refused(411, "Content-Length is missing")
    if not (stated.isascii() and stated.isdigit() and len(stated) < 16):
        raise Refused(400, "Content-Length is no number")
    if int(stated) > most:
        raise Refused(413, f"{stated} bytes are too many; {most} are taken")
    return int(stated)
