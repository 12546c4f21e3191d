"""What the checks of `detr doctor` return, and how they ask a server without telling it anything."""
from __future__ import annotations

import ipaddress
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

OK, WARNING, WRONG, NOT_ASKED = "ok", "warning", "wrong", "not asked for"
ANSWER = 10.0  # seconds to wait for one answer
MOST_READ = 2**16  # bytes of an answer
LONGEST = 300  # characters of what an error says


class Finding(BaseModel):
    """What a check found."""

    model_config = ConfigDict(frozen=True)

    check: str
    found: str
    verdict: Literal["ok", "warning", "wrong", "not asked for"]
    advice: str = ""  # what to do, in a sentence


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, found=found, verdict=OK)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, found=found, verdict=WARNING, advice=advice)


def wrong(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, found=found, verdict=WRONG, advice=advice)


def not_asked(check: str, found: str) -> Finding:
    return Finding(check=check, found=found, verdict=NOT_ASKED)


def ask(url: str, content: Any = None) -> tuple[int, Any, bytes]:
    """(status, headers, beginning of the body) of a request without any secret. Raises OSError.

    content: JSON to POST. Nobody's certificate is looked at; who sends a secret does that.
    """
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=anyone))
    data = None if content is None else json.dumps(content).encode()
    try:
        request = urllib.request.Request(bare(url), data, {"Content-Type": "application/json"} if data else {})
        with opener.open(request, timeout=ANSWER) as answer:
            return answer.status, answer.headers, answer.read(MOST_READ)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read(MOST_READ)
    except urllib.error.URLError as error:
        raise OSError(getattr(error.reason, "strerror", None) or one_line(error.reason)) from error
    except ValueError as error:
        raise OSError(str(error)) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *request: Any) -> None:
        """The first answer is the one that is asked for."""


def bare(url: str) -> str:
    """A URL without user and password."""
    return re.sub(r"://[^/@]*@", "://", url)


def is_loopback(url: str) -> bool:
    """Whether this machine alone can reach it."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)


def one_line(error: Any) -> str:
    """What an error says, in one line of no great length."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
