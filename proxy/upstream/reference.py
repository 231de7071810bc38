"""Resolve the URL of a narinfo, or of a redirect, against where it was found."""

from __future__ import annotations

import re
import urllib.parse

_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_DOTTED = re.compile(r"/\.{1,2}(?:[/?#]|\Z)")


def resolved(base: str, reference: str) -> str:
    """Resolve a reference (RFC 3986 §5) without touching a byte of it; drop user and password.

    Not `urllib.parse.urljoin`, which merges slashes that belong to the name of an object, except where
    dots have to be resolved.

    Raises:
        ValueError: It is no URL.
    """
    parts = urllib.parse.urlsplit(base)
    if _ABSOLUTE.match(reference):
        url = reference
    elif reference.startswith("//"):
        url = f"{parts.scheme}:{reference}"
    elif reference.startswith("/"):
        url = f"{parts.scheme}://{parts.netloc}{reference}"
    else:
        folder = parts.path.rpartition("/")[0]
        url = f"{parts.scheme}://{parts.netloc}{folder}/{reference}"
    if _DOTTED.search(url):
        url = urllib.parse.urljoin(base, reference)
    split = urllib.parse.urlsplit(url)
    _ = split.port  # raises when it is none
    authority = split.netloc.rpartition("@")[2]
    return url.replace(f"//{split.netloc}", f"//{authority}", 1)
