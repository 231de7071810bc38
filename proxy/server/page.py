"""The page for people at ``/``: what this is, and how to point Nix here."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

KIBI = 1024

_HOST = re.compile(r"[A-Za-z0-9.\-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?", re.ASCII)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nix-cache-proxy</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ padding: .8rem 1rem; border-radius: .4rem; background: #8882 }}
pre {{ white-space: pre-wrap; word-break: break-all }}
table {{ border-collapse: collapse }} th, td {{ text-align: left; padding: .1rem 1.2rem .1rem 0 }}
</style>
<h1>nix-cache-proxy</h1>
<p>A binary cache for Nix. It fetches what it does not have from the caches below, checks it, and
keeps it.</p>
<h2>Point Nix here</h2>
<p><code>nix.conf</code>:</p>
<pre>substituters = {url}
trusted-public-keys = {keys}</pre>
<p>NixOS:</p>
<pre>nix.settings.substituters = lib.mkForce [ "{url}" ];
nix.settings.trusted-public-keys = [ {quoted_keys} ];</pre>
<h2>State</h2>
<table>
<tr><th>Upstreams<td>{upstreams}
<tr><th>Mode<td>{mode}
<tr><th>In the store<td>{paths}, {size}
</table>
<p><a href="nix-cache-info">nix-cache-info</a> · <a href="metrics">metrics</a> ·
<a href="healthz">healthz</a> · <a href="readyz">readyz</a> · version {version}</p>
</html>
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the page tells: upstreams and what is to be said of each, public keys, what is in the store."""

    upstreams: Sequence[str]
    keys: Sequence[str]
    paths: int
    size: int
    version: str
    mode: str = "auto"


def render(facts: Facts, host: str | None) -> str:
    """Write the page.

    Args:
        facts: What to tell.
        host: The request's Host header: the name by which the reader reaches us. It is shown only when
            it looks like one.
    """
    name = host if host is not None and _HOST.fullmatch(host) else "localhost:8627"
    return _PAGE.format(
        url=html.escape(f"http://{name}"),
        keys=html.escape(" ".join(facts.keys)),
        quoted_keys=html.escape(" ".join(f'"{key}"' for key in facts.keys)),
        upstreams=html.escape(", ".join(facts.upstreams)) or "none",
        paths="1 path" if facts.paths == 1 else f"{facts.paths:,} paths",
        size=_human(facts.size),
        mode=html.escape(facts.mode),
        version=html.escape(facts.version),
    )


def _human(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < KIBI:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= KIBI
    return f"{size:.1f} TiB"
