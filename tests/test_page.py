"""The page for people at ``/``: what it says can be copied and works."""

from __future__ import annotations

import html
import re
import urllib.request
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPMessage
from urllib.parse import urljoin

import pytest

from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.nix_client import NixClient
from tests.waiting import eventually

ENTRY = StoreEntry.make("hello-1.0")

VOID = {"meta", "link", "br", "hr", "img", "input"}
CLOSED_BY_THEMSELVES = {"p", "li", "tr", "td", "th", "html", "body", "head"}
"""Elements whose end tag HTML lets one leave out."""


class Outline(HTMLParser):
    """Reads a page strictly: every element that has to be closed is, and in order.

    Attributes:
        text: What is shown, by the innermost element it stands in.
        links: Where the page leads.
        errors: What is not HTML.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.errors: list[str] = []
        self.declared = ""
        self.resources: list[str] = []
        self._open: list[str] = []

    def handle_decl(self, decl: str) -> None:
        """Take the doctype."""
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.errors.append(f"<{tag}> has an attribute twice")
        values = dict(attrs)
        self.links += [value for value in [values.get("href")] if value and tag == "a"]
        outside = [values.get("src"), values.get("href") if tag == "link" else None]
        self.resources += [value for value in outside if value]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close an element, and those inside of it that close by themselves."""
        while self._open and self._open[-1] != tag and self._open[-1] in CLOSED_BY_THEMSELVES:
            self._open.pop()
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        """Take text."""
        self.text.append((self._open[-1] if self._open else "", data))

    def close(self) -> None:
        """Say what is still open."""
        super().close()
        left = [tag for tag in self._open if tag not in CLOSED_BY_THEMSELVES]
        self.errors += [f"<{tag}> is not closed" for tag in left]


def page(proxy: DaemonProcess, host: str | None = None) -> tuple[HTTPMessage, str]:
    """Return the headers of the page and its text, asked for under a name of our choice."""
    connection = HTTPConnection(proxy.addresses[0], timeout=30)
    try:
        connection.request("GET", "/", headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.headers, answer.read().decode()
    finally:
        connection.close()


def outline(text: str) -> Outline:
    """Read a page."""
    parser = Outline()
    parser.feed(text)
    parser.close()
    return parser


def settings(text: str) -> dict[str, str]:
    """Return what the page says belongs into ``nix.conf``."""
    found = re.search(r"<pre>(substituters = .*?)</pre>", text, re.DOTALL)
    assert found is not None
    return dict(line.split(" = ", 1) for line in html.unescape(found[1]).splitlines())


def test_the_page_is_html(daemon: RunDaemon) -> None:
    """It is HTML that a parser has nothing to say against, with a title, and says so."""
    headers, text = page(daemon())
    parsed = outline(text)
    assert headers.get_content_type() == "text/html"
    assert headers.get_content_charset() == "utf-8"
    assert parsed.declared.lower() == "doctype html"
    assert parsed.errors == []
    assert ("title", "nix-cache-proxy") in parsed.text


def test_the_page_needs_nothing_from_elsewhere(daemon: RunDaemon) -> None:
    """It loads no script, style, font or image from anywhere: it works in a LAN without a way out."""
    _, text = page(daemon())
    assert outline(text).resources == []
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_its_links_lead_somewhere(daemon: RunDaemon) -> None:
    """Every link on it is answered with 200 by the daemon itself."""
    proxy = daemon()
    links = outline(page(proxy)[1]).links
    assert len(links) >= 4
    for link in links:
        url = urljoin(f"{proxy.url}/", link)
        assert url.startswith(f"{proxy.url}/")
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - http, on loopback
            assert answer.status == 200


def test_it_shows_the_name_by_which_it_was_reached(daemon: RunDaemon) -> None:
    """The URL to copy has the request's own Host, which is the name that works for the reader."""
    proxy = daemon()
    for host in ("cache.lan:8627", "cache", "10.0.0.7:80", "[fd00::7]:8627", "a-b.example.org"):
        _, text = page(proxy, host)
        assert settings(text)["substituters"] == f"http://{host}"
        assert f'[ "http://{host}" ]' in html.unescape(text)


def test_a_host_that_is_none_is_not_shown(daemon: RunDaemon) -> None:
    """Nothing that a client makes up gets into the page, escaped or not."""
    proxy = daemon()
    for host in ("<script>alert(1)</script>", 'x";y', "a b", "user@host", "host/path"):
        connection = HTTPConnection(proxy.addresses[0], timeout=30)
        connection.putrequest("GET", "/", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status in {200, 400}
        assert host not in text
        assert html.escape(host) not in text
        if answer.status == 200:
            assert outline(text).errors == []
            assert settings(text)["substituters"].startswith("http://localhost:")


def test_it_shows_every_key_that_clients_need(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """The keys are those of [trust] and of every upstream, each once, in both forms."""
    other = SigningKey("other-1")
    upstream = threaded_sim()
    table = f'[[upstream]]\nname = "more"\nurl = "{threaded_sim().url}"\nkeys = ["{other.public}"]'
    _, text = page(daemon(upstream.url, config=table))
    assert settings(text)["trusted-public-keys"].split() == [key.public, other.public]
    assert f'[ "{key.public}" "{other.public}" ]' in html.unescape(text)


def test_it_hides_no_secret_in_the_open(daemon: RunDaemon) -> None:
    """An upstream's password is on neither the page nor the metrics."""
    table = '[[upstream]]\nname = "private"\nurl = "https://user:s3cret@private.example/team"'
    proxy = daemon(config=table)
    _, text = page(proxy)
    assert "private.example/team" in text
    assert "s3cret" not in text
    assert b"s3cret" not in proxy.get("/metrics")


def test_it_counts_what_is_in_the_store(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """The number of paths on the page is that in the store."""
    proxy = daemon(threaded_sim(ENTRY).url)
    assert "0 paths" in page(proxy)[1]
    found = re.search(r"^URL: (.*)$", proxy.get(ENTRY.narinfo_path).decode(), re.MULTILINE)
    assert found is not None
    proxy.get(f"/{found[1]}")
    eventually(lambda: proxy.metric("store_paths") >= 1)  # what was stored is counted in batches
    assert re.search(r"\b1 paths?,", page(proxy)[1])


@pytest.mark.needs("nix", "nix-store")
def test_what_it_says_works(threaded_sim: RunSimulator, daemon: RunDaemon, nix: NixClient) -> None:
    """Copied into ``nix.conf`` as they stand, its lines are all that Nix needs."""
    proxy = daemon(threaded_sim(ENTRY).url)
    said = settings(page(proxy)[1])
    nix.settings["trusted-public-keys"] = ""
    nix.settings.update(said)
    done = nix.run("nix-store", "--realise", ENTRY.store_path, "--store", nix.store)
    assert done.returncode == 0, done.stderr
    assert nix.installed() == {ENTRY.base_name}
