"""The HTTP client as we use it: nothing is decoded, followed, stored or added that nobody asked for."""

from __future__ import annotations

import ssl

import aiohttp

from proxy import __version__

READ_BUFFER = 2**18
"""Bytes that the HTTP client buffers for a connection before it stops reading from the socket."""

HEADERS = {"User-Agent": f"nix-cache-proxy/{__version__}", "Accept": "*/*"}


def session(
    *,
    ca_file: str | None,
    connect_timeout: float,
    read_timeout: float,
    max_connections: int,
) -> aiohttp.ClientSession:
    """Make a pool of connections. Inside of a running event loop.

    Args:
        ca_file: Certificates to trust instead of the system's.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds without a byte after which an answer is given up.
        max_connections: Connections open at once; 0 for any number.

    Raises:
        OSError: ``ca_file`` cannot be read or holds no certificate.
    """
    tls = ssl.create_default_context(cafile=ca_file) if ca_file else True
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections, ttl_dns_cache=300, ssl=tls),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout, sock_read=read_timeout
        ),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=HEADERS,
        skip_auto_headers=("Accept-Encoding",),
        read_bufsize=READ_BUFFER,
    )
