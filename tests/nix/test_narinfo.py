"""Tests of `proxy.nix.narinfo`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ParseError, SignatureError, WrongPathError
from proxy.nix import narinfo
from proxy.nix.hashes import Hash
from proxy.nix.narinfo import NarInfo
from proxy.nix.signature import Keyring, PublicKey, SecretKey, Signature
from proxy.nix.store_path import StorePath, parse_hash_part
from tests.nix.strategies import narinfo_texts, secret_keys, urls

NIXOS = PublicKey.parse("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=")

CURL = b"""\
StorePath: /nix/store/syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin
URL: nar/05ra3y72i3qjri7xskf9qj8kb29r6naqy1sqpbs3azi3xcigmj56.nar.xz
Compression: xz
FileHash: sha256:05ra3y72i3qjri7xskf9qj8kb29r6naqy1sqpbs3azi3xcigmj56
FileSize: 68852
NarHash: sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0
NarSize: 196040
References: 0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0 \
6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115 \
j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12 \
yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n
Deriver: 5rwxzi7pal3qhpsyfc16gzkh939q1np6-curl-7.82.0.drv
Sig: cache.nixos.org-1:\
TsTTb3WGTZKphvYdBHXwo6weVILmTytUjLB+vcX89fOjjRicCHmKA4RCPMVLkj6TMJ4GMX3HPVWRdD1hkeKZBQ==
"""
"""A narinfo of cache.nixos.org, as it serves it."""

HELLO = b"""\
StorePath: /nix/store/w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10
URL: nar/15zk4zszw9lgkdkkwy7w11m5vag11n5dhv2i6hj308qpxczvdddx.nar.xz
Compression: xz
FileHash: sha256:15zk4zszw9lgkdkkwy7w11m5vag11n5dhv2i6hj308qpxczvdddx
FileSize: 41232
NarHash: sha256:1mi14cqk363wv368ffiiy01knardmnlyphi6h9xv6dkjz44hk30i
NarSize: 205968
References: 9df65igwjmf2wbw0gbrrgair6piqjgmi-glibc-2.31 w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10
Sig: cache.nixos.org-1:\
uP5KU8MCmyRnKGlN5oEv6xWJBI5EO/Pf5aFztZuLSz8BpCcZ1fdBnJkVXhBAlxkdm/CemsgQskhwvyd2yghTAg==
"""
"""Another, of a path that refers to itself."""

KEY = SecretKey.from_seed("test-1", b"t" * 32)
OTHER_KEY = SecretKey.from_seed("test-1", b"u" * 32)
HASH = "w9yy7v61ipb5rx6i35zq1mvc2iqfmps1"
PATH = f"/nix/store/{HASH}-hello-2.10"
NAR_HASH = "sha256:1mi14cqk363wv368ffiiy01knardmnlyphi6h9xv6dkjz44hk30i"
CA = f"CA: text:{NAR_HASH}"
REFERENCES = f"References: {HASH}-hello-2.10\n".encode()
GOOD_SIG = str(KEY.sign(b"")).encode()


def minimal(*more: str) -> bytes:
    """Write the least that a narinfo can be, and ``more`` lines."""
    lines = [f"StorePath: {PATH}", "URL: nar/x.nar", f"NarHash: {NAR_HASH}", "NarSize: 205968"]
    return "".join(f"{line}\n" for line in [*lines, *more]).encode()


def without(field: str, text: bytes = HELLO) -> bytes:
    """Take the lines of a field out."""
    return re.sub(rb"(?m)^%s:.*\n" % field.encode(), b"", text)


def with_value(field: str, value: str, text: bytes = HELLO) -> bytes:
    """Give a field of a text another value."""
    changed, count = re.subn(
        rb"(?m)^%s:.*$" % field.encode(), lambda _: f"{field}: {value}".encode(), text
    )
    assert count == 1
    return changed


def line_of(field: str, text: bytes = HELLO) -> int:
    """Return the 1-based line of a field."""
    return 1 + [line.partition(b":")[0] for line in text.split(b"\n")].index(field.encode())


def crlf(text: bytes, first: int) -> bytes:
    """Let the lines from ``first`` on end as on Windows."""
    lines = text.split(b"\n")
    return b"\n".join([*lines[: first - 1], b"\r\n".join(lines[first - 1 :])])


def fingerprint_by_hand(text: bytes) -> bytes:
    """Build the fingerprint from a text's fields, as the protocol describes it."""
    fields = dict(re.findall(r"(?m)^(\w+): (.*)$", text.decode()))
    references = sorted({f"/nix/store/{name}" for name in fields["References"].split()})
    return ";".join(
        ["1", fields["StorePath"], fields["NarHash"], fields["NarSize"], ",".join(references)]
    ).encode()


def signed(text: bytes, *keys: SecretKey) -> bytes:
    """Sign a text that has no signature yet."""
    fingerprint = narinfo.parse(text).fingerprint
    return text + b"".join(f"Sig: {key.sign(fingerprint)}\n".encode() for key in keys)


def split_as_nix(text: str) -> list[tuple[str, str]]:
    """Cut a narinfo as ``NarInfo::NarInfo`` of Nix 2.35 does, step by step: a second opinion."""
    fields = []
    position = 0
    while position < len(text):
        colon = text.index(":", position)
        end = text.index("\n", colon + 2)
        fields.append((text[position:colon], text[colon + 2 : end]))
        position = end + 1
    return fields


def read_as_nix(text: bytes) -> tuple[object, ...]:
    """Read a narinfo as Nix does; `read_by_us` is in the same order.

    Raises:
        LookupError: Where Nix throws.
        ValueError: Also where Nix throws.
    """
    fields = split_as_nix(text.decode())
    last = dict(fields)
    only = {"References": "", "CA": ""}
    for name, value in fields:
        if only.get(name, "").strip(" "):
            raise ValueError(name)
        if name in only:
            only[name] = value
    derivers = [value for name, value in fields if name == "Deriver" and value != "unknown-deriver"]
    if not last["URL"] or int(last["NarSize"]) == 0:
        raise ValueError(text)
    return (
        StorePath.parse(last["StorePath"]),
        Hash.parse(last["NarHash"]),
        int(last["NarSize"]),
        {StorePath.parse_base_name(name) for name in only["References"].split(" ") if name},
        {Signature.parse(value) for name, value in fields if name == "Sig"},
        last["URL"],
        last.get("Compression") or "bzip2",
        Hash.parse(last["FileHash"]) if "FileHash" in last else None,
        int(last.get("FileSize", "0")),
        [StorePath.parse_base_name(value).base_name for value in derivers][-1:],
        only["CA"],
    )


def read_by_us(info: NarInfo) -> tuple[object, ...]:
    """Put what we read in the order of `read_as_nix`."""
    return (
        info.store_path,
        info.nar_hash,
        info.nar_size,
        set(info.references),
        set(info.signatures),
        info.url,
        info.compression,
        info.file_hash,
        info.file_size or 0,
        [info.deriver] if info.deriver else [],
        info.ca or "",
    )


def assert_nix_agrees(info: NarInfo) -> None:
    """Nix reads from what we write what we read from what came."""
    assert read_as_nix(narinfo.format(info)) == read_by_us(info)


# Reading


def test_fields() -> None:
    """Every field of a real narinfo is read."""
    info = narinfo.parse(CURL)
    assert str(info.store_path) == "/nix/store/syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin"
    assert info.url == "nar/05ra3y72i3qjri7xskf9qj8kb29r6naqy1sqpbs3azi3xcigmj56.nar.xz"
    assert info.compression == "xz"
    assert str(info.file_hash) == ("sha256:05ra3y72i3qjri7xskf9qj8kb29r6naqy1sqpbs3azi3xcigmj56")
    assert info.file_size == 68852
    assert str(info.nar_hash) == "sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0"
    assert info.nar_size == 196040
    assert [path.name for path in info.references] == [
        "curl-7.82.0",
        "glibc-2.34-115",
        "zlib-1.2.12",
        "openssl-1.1.1n",
    ]
    assert info.deriver == "5rwxzi7pal3qhpsyfc16gzkh939q1np6-curl-7.82.0.drv"
    assert [signature.key_name for signature in info.signatures] == ["cache.nixos.org-1"]
    assert info.ca is None


def test_least_narinfo() -> None:
    """Four fields are enough, as nix-serve writes it; without Compression it is bzip2."""
    info = narinfo.parse(minimal())
    assert info.references == ()
    assert info.signatures == ()
    assert info.compression == "bzip2"
    assert (info.file_hash, info.file_size, info.deriver, info.ca) == (None, None, None, None)


def test_nar_name() -> None:
    """The name that we issue is made of hash part, NarHash and compression."""
    assert str(narinfo.parse(HELLO).nar_name) == (
        f"{HASH}-1mi14cqk363wv368ffiiy01knardmnlyphi6h9xv6dkjz44hk30i.nar.xz"
    )


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        pytest.param("Compression: ", "compression", "bzip2", id="empty Compression"),
        pytest.param("Compression: none", "compression", "none", id="none"),
        pytest.param("Compression: lzip", "compression", "lzip", id="one that we cannot read"),
        pytest.param("FileSize: 0", "file_size", None, id="FileSize 0 is not told"),
        pytest.param("FileSize: 007", "file_size", 7, id="leading zeros"),
        pytest.param("NarSize:3000472", "nar_size", 472, id="first character of the value lost"),
        pytest.param("NarSize:\t5", "nar_size", 5, id="any character after the colon"),
        pytest.param("NarSize: 9223372036854775807", "nar_size", 2**63 - 1, id="largest size"),
        pytest.param(
            f"NarHash: {Hash.parse(NAR_HASH).sri}", "nar_hash", Hash.parse(NAR_HASH), id="SRI"
        ),
        pytest.param("References: ", "references", (), id="empty References"),
        pytest.param("References:    ", "references", (), id="References of spaces"),
        pytest.param("Deriver: unknown-deriver", "deriver", None, id="unknown deriver"),
        pytest.param(f"Deriver: {HASH}-x.drv", "deriver", f"{HASH}-x.drv", id="deriver"),
        pytest.param("Deriver: ", "deriver", None, id="empty Deriver"),
        pytest.param(f"Deriver: {PATH}.drv", "deriver", None, id="full path as Deriver"),
        pytest.param("CA: ", "ca", None, id="empty CA"),
        pytest.param("CA: quantum:x", "ca", None, id="unknown kind of CA"),
        pytest.param(f"CA: text:{NAR_HASH}", "ca", f"text:{NAR_HASH}", id="text"),
        pytest.param(f"CA: fixed:{NAR_HASH}", "ca", f"fixed:{NAR_HASH}", id="fixed"),
        pytest.param(f"CA: fixed:r:{NAR_HASH}", "ca", f"fixed:r:{NAR_HASH}", id="fixed tree"),
        pytest.param(f"CA: fixed:git:{NAR_HASH}", "ca", None, id="experimental git tree"),
        pytest.param("CA: fixed:r:sha256:zzz", "ca", None, id="CA with a bad hash"),
        pytest.param(f"CA: fixed:{Hash.parse(NAR_HASH).sri}", "ca", None, id="CA in SRI"),
        pytest.param("CA: text:sha1:" + "0" * 40, "ca", None, id="text must be sha256"),
        pytest.param("Sig: garbage", "signatures", (), id="Sig without colon"),
        pytest.param("Sig: a:AAAA", "signatures", (), id="Sig too short"),
        pytest.param("Sig: a:!", "signatures", (), id="Sig that is not base64"),
        pytest.param("Sig: ", "signatures", (), id="empty Sig"),
        pytest.param("URL: http://b/x?y=1#z", "url", "http://b/x?y=1#z", id="URL is opaque"),
    ],
)
def test_values(line: str, attribute: str, value: object) -> None:
    """Each value means what it means to Nix; what would only get in Nix's way means nothing."""
    info = narinfo.parse(minimal(line))
    assert getattr(info, attribute) == value
    assert narinfo.parse(narinfo.format(info)) == info
    assert_nix_agrees(info)


@pytest.mark.parametrize(
    ("field", "first", "last", "attribute"),
    [
        ("StorePath", f"/nix/store/{HASH[::-1]}-a", PATH, "store_path"),
        ("URL", "nar/a", "nar/b", "url"),
        ("Compression", "xz", "zstd", "compression"),
        ("FileHash", NAR_HASH, f"md5:{'0' * 32}", "file_hash"),
        ("FileSize", "1", "2", "file_size"),
        ("NarHash", f"sha256:{'0' * 52}", NAR_HASH, "nar_hash"),
        ("NarSize", "1", "2", "nar_size"),
        ("Deriver", f"{HASH}-a.drv", f"{HASH}-b.drv", "deriver"),
    ],
)
def test_last_of_a_scalar_wins(field: str, first: str, last: str, attribute: str) -> None:
    """Of a scalar that is given twice the last one counts."""
    twice = narinfo.parse(minimal(f"{field}: {first}", f"{field}: {last}"))
    once = narinfo.parse(minimal(f"{field}: {last}"))
    assert getattr(twice, attribute) == getattr(once, attribute)
    assert_nix_agrees(twice)


def test_a_dropped_line_changes_nothing() -> None:
    """A second Deriver that is malformed, or unknown, does not undo the first."""
    info = narinfo.parse(minimal(f"Deriver: {HASH}-a.drv", "Deriver: ", "Deriver: unknown-deriver"))
    assert info.deriver == f"{HASH}-a.drv"
    assert_nix_agrees(info)


def test_only_one_references_line_has_to_be_filled() -> None:
    """An empty References before a filled one is no second one, as in Nix."""
    info = narinfo.parse(minimal("References: ", f"References: {HASH}-hello-2.10"))
    assert [str(path) for path in info.references] == [PATH]
    assert_nix_agrees(info)


def test_blank_line_hides_the_next_field() -> None:
    """After a blank line a field's name begins with a line break, so that it is unknown."""
    text = minimal().replace(b"NarSize", b"NarSize: 7\n\nNarSize")
    info = narinfo.parse(text)
    assert info.nar_size == 7
    assert narinfo.format(info) == text


# Refusing


def refused(what: str, text: bytes, reason: str, line: int | None, field: str | None) -> object:
    """Write a row of the table below."""
    return pytest.param(text, reason, line, field, id=what)


@pytest.mark.parametrize(
    ("text", "reason", "line", "field"),
    [
        refused("empty", b"", "missing", None, "StorePath"),
        refused("a line break", b"\n", "no colon", 1, None),
        refused("HTML", b"<!DOCTYPE html>\n<html></html>\n", "no colon", 1, None),
        refused("HTML with colon", b"<a href='http://x'>\n", "missing", None, "StorePath"),
        refused("HTML cut short", b"<a href='http://x'>", "no line break", 1, None),
        refused("no final line break", HELLO[:-1], "no line break", 9, "Sig"),
        refused("cut in a value", HELLO[:30], "no line break", 1, "StorePath"),
        refused("cut before a value", minimal() + b"URL: ", "no line break", 5, "URL"),
        refused("cut after a colon", minimal() + b"URL:", "no line break", 5, "URL"),
        refused("cut in a name", minimal() + b"Compr", "no colon", 5, None),
        refused("blank line at the end", HELLO + b"\n", "no colon", 10, None),
        refused("two blank lines at the end", HELLO + b"\n\n", "no colon", 10, None),
        refused("CRLF", crlf(HELLO, 1), "illegal character '\\r'", 1, "StorePath"),
        refused("CRLF from 2 on", crlf(HELLO, 2), "unknown compression 'xz\\r'", 3, "Compression"),
        refused("CRLF from 5 on", crlf(HELLO, 5), "not a number of bytes", 5, "FileSize"),
        refused("CRLF from 8 on", crlf(HELLO, 8), "illegal character '\\r'", 8, "References"),
        refused("null byte", HELLO.replace(b"xz\n", b"xz\0\n"), "null byte", 2, None),
        refused("Latin-1", HELLO + b"System: \xe9\n", "not UTF-8", 10, None),
        refused("UTF-16", HELLO.decode().encode("utf-16-le"), "null byte", 1, None),
        refused("byte order mark", b"\xef\xbb\xbf" + HELLO, "missing", None, "StorePath"),
        refused("leading space", b" " + HELLO, "missing", None, "StorePath"),
        refused("no StorePath", without("StorePath"), "missing", None, "StorePath"),
        refused("no URL", without("URL"), "missing or empty", None, "URL"),
        refused("no NarHash", without("NarHash"), "missing", None, "NarHash"),
        refused("no NarSize", without("NarSize"), "missing or zero", None, "NarSize"),
        refused("lower-case name", HELLO.replace(b"URL", b"url"), "missing", None, "URL"),
        refused("space before a colon", HELLO.replace(b"URL:", b"URL :"), "missing", None, "URL"),
        refused(
            "blank line before a field",
            HELLO.replace(b"NarSize", b"\nNarSize"),
            "missing or zero",
            None,
            "NarSize",
        ),
        refused(
            "References without a space swallow the next line",
            minimal("References:", "Sig: a:b"),
            "32 digits",
            5,
            "References",
        ),
        refused("References twice", HELLO + REFERENCES, "twice", 10, "References"),
        refused("empty second References", HELLO + b"References: \n", "twice", 10, "References"),
        refused("CA twice", minimal(CA, CA), "twice", 6, "CA"),
        refused("empty second CA", minimal(CA, "CA: "), "twice", 6, "CA"),
        refused(
            "lines are counted as one sees them",
            b"X:\nY: \n\nZ: \n" + with_value("NarSize", "x"),
            "not a number of bytes",
            11,
            "NarSize",
        ),
    ],
)
def test_malformed_texts(text: bytes, reason: str, line: int | None, field: str | None) -> None:
    """A text that some Nix refuses is refused, with the line that one sees and the field."""
    with pytest.raises(ParseError) as caught:
        narinfo.parse(text)
    assert reason in caught.value.reason
    assert (caught.value.what, caught.value.line, caught.value.field) == ("narinfo", line, field)


BAD_NUMBERS = ["", "-1", "+1", " 1", "1 ", "1.0", "1e3", "0x10", "1_000", "٣", "²"]
BAD_SIZES = [*BAD_NUMBERS, "9223372036854775808", "18446744073709551616", "9" * 5000]
BAD_HASHES = ["", "x", "sha256:", NAR_HASH[7:], NAR_HASH + "0", "sha256:" + "e" * 52, "blake3:00"]
BAD_VALUES = {
    "StorePath": ["", f"{HASH}-x", f"/gnu/store/{HASH}-x", f"{PATH}/bin", f"{PATH} ", f" {PATH}"],
    "URL": ["", " ", "nar/a b", "nar/a\t", "nar/a\r", "nar/é", "nar/\x7f", "nar/\x1b[31m"],
    "Compression": ["zip", "XZ", "xz ", " xz", "deflate", "identity", "x" * 5000],
    "FileHash": BAD_HASHES,
    "FileSize": BAD_SIZES,
    "NarHash": [*BAD_HASHES, f"sha1:{'0' * 40}", f"sha512:{'0' * 128}"],
    "NarSize": [*BAD_SIZES, "0", "00"],
    "References": ["x", PATH, f"{HASH}-a,{HASH}-b", f"{HASH}-a\t{HASH}-b", f"{HASH}-a {HASH}-"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field} {ascii(value)[:99]}")
        for field, values in BAD_VALUES.items()
        for value in values
    ],
)
def test_malformed_values(field: str, value: str) -> None:
    """A value that is not one is refused, with its line and field, and is not repeated in full."""
    with pytest.raises(ParseError) as caught:
        narinfo.parse(with_value(field, value))
    assert (caught.value.line, caught.value.field) == (line_of(field), field)
    assert len(str(caught.value)) < 150


@given(st.binary())
def test_parser_survives_anything(text: bytes) -> None:
    """Any bytes are refused with `ParseError`; random ones are no narinfo."""
    with pytest.raises(ParseError):
        narinfo.parse(text)


@given(narinfo_texts(), st.data())
def test_parser_survives_damage(text: bytes, data: st.DataObject) -> None:
    """A narinfo with some bytes replaced is refused, or read as Nix reads it."""
    damaged = bytearray(text)
    interesting = st.sampled_from([b"", b"\n", b":", b" ", b"\r", b"0", b"\0", b"\xff", b"Sig: "])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(start, min(len(damaged), start + 3)))
        damaged[start:end] = data.draw(interesting)
    try:
        info = narinfo.parse(bytes(damaged))
    except ParseError:
        return
    assert_nix_agrees(info)
    assert narinfo.parse(narinfo.format(info)) == info


# Writing


@pytest.mark.parametrize("text", [CURL, HELLO, minimal(), minimal("References: ", "X: y")])
def test_a_good_text_is_kept_to_the_byte(text: bytes) -> None:
    """Without another URL a good text comes out as it came in."""
    assert narinfo.format(narinfo.parse(text)) == text


@pytest.mark.parametrize("text", [CURL, HELLO])
def test_only_the_url_is_rewritten(text: bytes) -> None:
    """With another URL nothing else changes, and the signature still verifies."""
    written = narinfo.format(narinfo.parse(text), "nar/ours.nar.xz")
    assert written == with_value("URL", "nar/ours.nar.xz", text)
    info = narinfo.parse(written)
    Keyring([NIXOS]).verify(info.fingerprint, info.signatures)


@given(narinfo_texts(), urls)
def test_what_is_written_reads_the_same(text: bytes, url: str) -> None:
    """Reading what was written gives what was written, to us and to Nix."""
    info = narinfo.parse(text)
    written = narinfo.format(info)
    assert narinfo.parse(written) == info
    assert narinfo.format(narinfo.parse(written)) == written
    assert narinfo.parse(narinfo.format(info, url)) == replace(info, url=url)
    assert written.endswith(b"\n")
    assert_nix_agrees(info)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Sig: garbage", id="Sig without colon"),
        pytest.param(b"Sig: ", id="empty Sig"),
        pytest.param(b"Sig: :" + GOOD_SIG.partition(b":")[2], id="Sig without name"),
        pytest.param(b"Sig: a:" + GOOD_SIG, id="Sig with two colons"),
        pytest.param(b"Sig: " + GOOD_SIG[:-4], id="Sig too short"),
        pytest.param(b"Sig: " + GOOD_SIG[:-2] + b"AAAA", id="Sig too long"),
        pytest.param(b"Sig: " + GOOD_SIG + b"\r", id="Sig with a carriage return"),
        pytest.param(b"Deriver: ", id="empty Deriver"),
        pytest.param(b"Deriver: /nix/store/x.drv", id="Deriver that is no base name"),
        pytest.param(b"CA: quantum:sha256:00", id="CA of an unknown kind"),
        pytest.param(b"URL: nar/earlier", id="URL that a later one replaces"),
        pytest.param(b"URL: ", id="empty URL that a later one replaces"),
    ],
)
def test_lines_that_break_nix_are_dropped(line: bytes) -> None:
    """What makes some Nix refuse the whole narinfo goes, and everything else stays."""
    good = b"X: y\nSig: " + GOOD_SIG + b"\n"
    info = narinfo.parse(line + b"\n" + good + HELLO)
    assert narinfo.format(info) == good + HELLO
    assert info.signatures[0] == Signature.parse(GOOD_SIG.decode())


def test_url_is_written_where_the_last_one_stood() -> None:
    """Of several URLs the last one's place is kept."""
    info = narinfo.parse(minimal("X: y", "URL: nar/last", "Z: "))
    assert narinfo.format(info, "nar/new") == without("URL", minimal("X: y")) + (
        b"URL: nar/new\nZ: \n"
    )


@pytest.mark.parametrize("url", ["", "nar/a\nSig: x", "nar/a b", "nar/é"])
def test_an_url_that_would_break_the_text_is_refused(url: str) -> None:
    """Nothing can be written that would not read back."""
    with pytest.raises(ParseError):
        narinfo.format(narinfo.parse(HELLO), url)


# Trusting


@pytest.mark.parametrize("text", [CURL, HELLO])
def test_fingerprint_of_real_narinfos(text: bytes) -> None:
    """The key of cache.nixos.org verifies what cache.nixos.org serves."""
    info = narinfo.parse(text)
    assert info.fingerprint == fingerprint_by_hand(text)
    hash_part = info.store_path.hash_part
    assert narinfo.verify(info, hash_part=hash_part, keyring=Keyring([NIXOS])) is info


@pytest.mark.parametrize(
    "references",
    [
        pytest.param("c-z c-a", id="not sorted"),
        pytest.param("c-a c-z c-a", id="twice"),
        pytest.param("  c-z   c-a ", id="with many spaces"),
    ],
)
def test_fingerprint_takes_references_as_a_set(references: str) -> None:
    """References are signed sorted, each once, whatever the text says."""
    in_text = references.replace("c-", f"{HASH}-")
    info = narinfo.parse(minimal(f"References: {in_text}"))
    tail = f";/nix/store/{HASH}-a,/nix/store/{HASH}-z"
    assert info.fingerprint == f"1;{PATH};{NAR_HASH};205968{tail}".encode()


@pytest.mark.parametrize("references", [[], ["References: "]])
def test_fingerprint_without_references(references: list[str]) -> None:
    """Without references the fingerprint ends in a semicolon."""
    info = narinfo.parse(minimal(*references))
    assert info.fingerprint == f"1;{PATH};{NAR_HASH};205968;".encode()


@pytest.mark.parametrize("spelling", ["hex", "base64"])
def test_fingerprint_spells_hashes_in_nix32(spelling: str) -> None:
    """However NarHash is spelt, in nix32 it is signed."""
    value = f"sha256:{getattr(Hash.parse(NAR_HASH), spelling)}"
    info = narinfo.parse(with_value("NarHash", value))
    assert info.fingerprint == fingerprint_by_hand(HELLO)


@given(narinfo_texts(), secret_keys, urls)
def test_rewritten_narinfos_verify(text: bytes, key: SecretKey, url: str) -> None:
    """What its key signed verifies after we have written it with another URL."""
    keyring = Keyring([key.public_key])
    info = narinfo.parse(narinfo.format(narinfo.parse(signed(text, key)), url))
    narinfo.verify(info, hash_part=info.store_path.hash_part, keyring=keyring)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("StorePath", f"/nix/store/{HASH}-hello-2.11"),
        ("NarHash", f"sha256:{'0' * 52}"),
        ("NarSize", "205969"),
        ("References", f"{HASH}-hello-2.10"),
    ],
)
def test_signed_fields_cannot_be_changed(field: str, value: str) -> None:
    """A change in what is signed is noticed."""
    info = narinfo.parse(with_value(field, value))
    with pytest.raises(SignatureError, match=r"the signature of cache\.nixos\.org-1 does not"):
        narinfo.verify(info, hash_part=parse_hash_part(HASH), keyring=Keyring([NIXOS]))


@pytest.mark.parametrize("keyring", [Keyring([NIXOS]), None])
def test_another_path_is_refused(keyring: Keyring | None) -> None:
    """A narinfo of another path is refused, valid signature or not."""
    asked = parse_hash_part(HASH[::-1])
    with pytest.raises(WrongPathError, match=f"asked for {asked}, but got {PATH}"):
        narinfo.verify(narinfo.parse(HELLO), hash_part=asked, keyring=keyring)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([KEY], id="alone"),
        pytest.param([OTHER_KEY, KEY], id="after one of the same name"),
        pytest.param([SecretKey.from_seed("x", b"x" * 32), KEY], id="after a stranger's"),
    ],
)
def test_one_valid_signature_is_enough(keys: list[SecretKey]) -> None:
    """One signature of a trusted key is enough, whatever others there are."""
    info = narinfo.parse(signed(minimal(), *keys))
    keyring = Keyring([KEY.public_key])
    narinfo.verify(info, hash_part=parse_hash_part(HASH), keyring=keyring)


@pytest.mark.parametrize(
    ("keys", "reason"), [([], "signed by nobody"), ([OTHER_KEY], "test-1 does not verify")]
)
def test_without_a_valid_signature_it_is_refused(keys: list[SecretKey], reason: str) -> None:
    """No signature of a trusted key, no trust: unless the upstream is trusted as it is."""
    info = narinfo.parse(signed(minimal(), *keys))
    hash_part = parse_hash_part(HASH)
    with pytest.raises(SignatureError, match=reason):
        narinfo.verify(info, hash_part=hash_part, keyring=Keyring([KEY.public_key]))
    assert narinfo.verify(info, hash_part=hash_part, keyring=None) is info
