"""Every error that this package raises.

Rules:

- every class ends in ``Error`` and derives from `ProxyError`;
- third-party exceptions are translated in the module that imports the third party, so nothing else
  leaves a module of ours;
- "absent" (`NotFoundError`: everybody was asked, nobody has it) and "unknown" (`UpstreamError`:
  somebody could not be asked) are never confused, because only the first may be remembered;
- ``server.app.STATUSES`` has a row for each class that can reach a client; a test walks the tree.

::

    ProxyError
    ├─ ParseError              a narinfo, hash, key … is malformed
    ├─ RequestError            the client asked for something that cannot exist
    │  └─ RangeError           … or for bytes that the file does not have
    ├─ NotFoundError           nobody has it
    ├─ OfflineError            nobody was asked, because nobody may be
    ├─ TrustError              it was there, and it is not what was signed
    │  ├─ SignatureError       no valid signature of a trusted key
    │  ├─ WrongPathError       the narinfo is for another store path
    │  ├─ HashMismatchError    FileHash or NarHash differ
    │  ├─ SizeMismatchError    FileSize or NarSize differ
    │  ├─ DecodeError          the compressed stream is damaged or truncated
    │  │  └─ DecodeMemoryError    … or needs too much memory
    │  └─ UnverifiableError    nothing here can check it
    ├─ UpstreamError           we do not know
    │  ├─ UpstreamUnavailableError   refused, reset, DNS, TLS
    │  │  ├─ UpstreamBrokeOffError   … or in the middle of its answer
    │  │  └─ UpstreamBusyError       … or 408, 429, 5xx
    │  ├─ UpstreamSkippedError       it has failed, and is left alone for now
    │  ├─ UpstreamTimeoutError       no answer in time
    │  ├─ UpstreamDeniedError        401, 403, 405, 407
    │  ├─ UpstreamProtocolError      an answer that no binary cache gives
    │  └─ UpstreamLiedError          it answered, and a `TrustError` says what is wrong with it
    ├─ StoreError              the local disk failed
    │  ├─ DamagedError         it does not hold what was put there
    │  └─ StoreLockedError     another daemon has the store
    ├─ ListenError             an address cannot be listened on
    ├─ CommandError            what an operator asked for cannot be done
    │  └─ NotRunningError      … because no daemon has the store
    └─ ConfigError             the configuration is wrong
"""

from __future__ import annotations

from typing import ClassVar


class ProxyError(Exception):
    """Base of everything below."""


class ParseError(ProxyError, ValueError):
    """A text of the binary-cache protocol is malformed.

    Args:
        what: What was parsed, in the field's words: ``"narinfo"``, ``"store path"``, ``"hash"``.
        reason: What is wrong with it, without the whole input.
        line: 1-based line, where the text has lines.
        field: The field's name, where the text has fields.
    """

    def __init__(
        self, what: str, reason: str, *, line: int | None = None, field: str | None = None
    ) -> None:
        self.what = what
        self.reason = reason
        self.line = line
        self.field = field
        where = "".join(
            (
                f", line {line}" if line is not None else "",
                f", field {field}" if field is not None else "",
            )
        )
        super().__init__(f"{what}{where}: {reason}")


class RequestError(ProxyError):
    """The client's request is malformed; no upstream is asked."""


class RangeError(RequestError):
    """The requested range lies outside of the file (RFC 9110 §15.5.17).

    Args:
        size: Bytes that the file has.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(f"the requested range lies outside of the {size} bytes there are")


class NotFoundError(ProxyError, LookupError):
    """Everybody who could have it was asked, and nobody has it."""


class OfflineError(ProxyError):
    """It is not here, and the operator wants no upstream to be asked."""


class TrustError(ProxyError):
    """Something arrived, and it is not what a trusted key signed."""

    kind: ClassVar[str] = "other"
    """A word for the ``kind`` label of metrics."""


class SignatureError(TrustError):
    """No valid signature of a trusted key."""

    kind = "signature"


class WrongPathError(TrustError):
    """The narinfo is for another store path than the one asked for."""

    kind = "store_path"


class HashMismatchError(TrustError):
    """FileHash or NarHash differ from what arrived."""

    kind = "hash"


class SizeMismatchError(TrustError):
    """FileSize or NarSize differ from what arrived."""

    kind = "size"


class DecodeError(TrustError):
    """The compressed stream is damaged, truncated, or asks for too much memory."""

    kind = "encoding"


class DecodeMemoryError(DecodeError):
    """The compressed stream asks for more memory than it may have."""


class UnverifiableError(TrustError):
    """No decoder reads the compression and there is no FileHash, so nothing can be checked."""

    kind = "unverifiable"


class UpstreamError(ProxyError):
    """An upstream could not be asked, so whether it has the path is unknown.

    Args:
        upstream: The upstream's configured name.
        reason: What happened, for the log.
    """

    outcome: ClassVar[str] = "error"
    """A word for the ``outcome`` label of metrics."""

    def __init__(self, upstream: str, reason: str) -> None:
        self.upstream = upstream
        self.reason = reason
        super().__init__(f"upstream {upstream}: {reason}")


class UpstreamUnavailableError(UpstreamError):
    """Refused, reset, DNS or TLS failure, or one of those below."""

    outcome = "unavailable"


class UpstreamBrokeOffError(UpstreamUnavailableError):
    """The answer began, and was cut off."""


class UpstreamBusyError(UpstreamUnavailableError):
    """408, 429 or 5xx: it answers that it cannot answer.

    Args:
        upstream: The upstream's configured name.
        reason: What happened, for the log.
        retry_after: Seconds for which it asks to be left alone (RFC 9110 §10.2.3).
    """

    def __init__(self, upstream: str, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(upstream, reason)
        self.retry_after = retry_after


class UpstreamSkippedError(UpstreamError):
    """It was not asked: it has failed before and is left alone for now, or it has its hands full with us."""

    outcome = "skipped"


class UpstreamTimeoutError(UpstreamError):
    """No answer, or no further byte, in time."""

    outcome = "timeout"


class UpstreamDeniedError(UpstreamError):
    """401, 403, 405 or 407: it refuses, most likely because our credentials are missing or wrong."""

    outcome = "denied"


class UpstreamProtocolError(UpstreamError):
    """An answer that no binary cache gives: HTML, a truncated narinfo, a redirect loop."""

    outcome = "protocol"


class UpstreamLiedError(UpstreamError):
    """It answered, and a `TrustError` (the cause of this one) says what is wrong with that."""

    outcome = "rejected"


class StoreError(ProxyError):
    """The local disk refused: full, read-only, vanished, damaged."""


class DamagedError(StoreError):
    """A file of the store is not what was put there, or cannot be read any more."""


class StoreLockedError(StoreError):
    """Another daemon has the store."""


class ListenError(ProxyError):
    """An address cannot be listened on: taken, not ours, not permitted."""


class CommandError(ProxyError):
    """What an operator asked for cannot be done, and nothing was changed."""


class NotRunningError(CommandError):
    """No daemon has the store."""


class ConfigError(ProxyError):
    """The configuration cannot be used.

    Args:
        reason: What is wrong, and what would be right.
        file: The configuration file, or where else the value came from (``"--listen"``).
        line: 1-based line of the key, when known.
        key: The key in dotted form (``"upstream[1].url"``), when known.
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        self.reason = reason
        self.file = file
        self.line = line
        self.key = key
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (where, key, reason) if part))
