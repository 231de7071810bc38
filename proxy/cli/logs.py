"""Logs: an observer that says in words what happened, and how loudly.

What an operator has to know is a warning; what explains one is info; every request and every answer of
an upstream is debug, because there are thousands of them a second.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict

import structlog

from proxy.config import LogConfig
from proxy.errors import UpstreamError, UpstreamLiedError
from proxy.events import (
    AskedAhead,
    BreakerClosed,
    BreakerOpened,
    ConfigReloaded,
    Event,
    Evicted,
    FastlaneClosed,
    FastlaneServed,
    Fault,
    FetchedAhead,
    FetchEnded,
    FetchingAhead,
    FetchStarted,
    Forgotten,
    Mode,
    ModeChanged,
    NotDecoded,
    PorterEnded,
    Published,
    Quarantined,
    Rejected,
    RequestServed,
    StoreChanged,
    StoreFailed,
    UpstreamAnswered,
    WorkerEnded,
    WorkerStarted,
)

_FAILURES = frozenset(failure.outcome for failure in UpstreamError.__subclasses__()) - {
    UpstreamLiedError.outcome  # every single lie is logged by itself
}


def set_up_logs(config: LogConfig) -> None:
    """Write logs to stderr: for people on a terminal, else one JSON object a line, unless configured."""
    level = logging.getLevelNamesMapping()[config.level.upper()]
    for_people = config.format == "console" or (config.format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *(
                (_printable, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
                if for_people
                else (_named_first, structlog.processors.JSONRenderer())
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    # aiohttp reports what clients drop or garble with a traceback each; events tell it all.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def _printable(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Write what upstreams and clients made up so that no terminal obeys it; JSON does so by itself."""
    return {
        name: _escaped(value) if isinstance(value, str) else value for name, value in event.items()
    }


def _named_first(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Put first what a line is about."""
    first = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    return {**first, **event}


def _escaped(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


class _Stderr:
    """Standard error, of which nobody may depend: not when it is closed, not when its disk is full."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


_LINES: Mapping[type[Event], tuple[int, str]] = {
    Rejected: (logging.WARNING, "refused"),
    NotDecoded: (logging.WARNING, "verified by FileHash alone"),
    Fault: (logging.ERROR, "a fault of the proxy itself; please report it"),
    FastlaneClosed: (logging.WARNING, "the fast lane is closed"),
    WorkerStarted: (logging.INFO, "worker started"),
    WorkerEnded: (logging.ERROR, "worker ended"),
    PorterEnded: (logging.ERROR, "porter ended"),
    FetchStarted: (logging.DEBUG, "fetching"),
    FetchingAhead: (logging.DEBUG, "fetching ahead"),
    FetchedAhead: (logging.DEBUG, "fetched ahead"),
    AskedAhead: (logging.DEBUG, "asked for what was fetched ahead"),
    Published: (logging.DEBUG, "stored"),
    Evicted: (logging.DEBUG, "evicted"),
    Quarantined: (logging.ERROR, "damaged, and taken out of the store"),
    RequestServed: (logging.DEBUG, "request"),
    FastlaneServed: (logging.DEBUG, "requests"),
    Forgotten: (logging.DEBUG, "forgotten"),
}
"""How loudly, and in which words, an event is told whose fields say the rest."""

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class EventLog:
    """Logs events, once `set_up_logs` has been called. An instance is an `proxy.events.Observer`."""

    def __init__(self) -> None:
        self._untold = {
            kind for kind, (level, _) in _LINES.items() if not log.is_enabled_for(level)
        }
        """Events that nobody wants to read of, which are nearly all: a closure is tens of thousands."""
        self._tells_answers = log.is_enabled_for(logging.DEBUG)
        self._failing: set[str] = set()
        self._left_alone: set[str] = set()
        self._keeps = True
        self._mode: Mode = "auto"

    def __call__(self, event: Event) -> None:
        """Log an event."""
        if type(event) in self._untold:
            return
        match event:
            case UpstreamAnswered():
                self._upstream_answered(event)
            case ModeChanged(mode):
                self._mode_changed(mode)
            case BreakerOpened() | BreakerClosed():
                self._breaker_changed(event)
            case StoreFailed() | StoreChanged():
                self._log_store(event)
            case FetchEnded():
                _log_fetch(event)
            case ConfigReloaded():
                _log_reload(event)
            case _:
                level, words = _LINES[type(event)]
                log.log(level, words, **asdict(event))

    def _log_store(self, event: StoreFailed | StoreChanged) -> None:
        """Say what failed, but not again and again while it is known that nothing is kept."""
        if isinstance(event, StoreFailed):
            tell = log.error if self._keeps else log.debug
            tell("the store failed", what=event.what, reason=event.reason)
            return
        self._keeps = not event.reason
        if event.reason:
            log.error("the store keeps nothing; clients are served uncached", reason=event.reason)
        else:
            log.info("the store keeps what is fetched again")

    def _mode_changed(self, mode: Mode) -> None:
        """Say it when it does change."""
        if mode != self._mode:
            log.warning("the mode has changed", mode=mode, before=self._mode)
        self._mode = mode

    def _breaker_changed(self, event: BreakerOpened | BreakerClosed) -> None:
        """Say once that an upstream is left alone, and once that it is asked again."""
        if isinstance(event, BreakerClosed):
            self._left_alone.discard(event.upstream)
            log.info("upstream asked again", upstream=event.upstream)
            return
        tell = log.debug if event.upstream in self._left_alone else log.warning
        self._left_alone.add(event.upstream)
        seconds = round(event.seconds, 1)
        tell("upstream left alone", upstream=event.upstream, reason=event.reason, seconds=seconds)

    def _upstream_answered(self, event: UpstreamAnswered) -> None:
        """Say once that an upstream has begun to fail, and once that it has recovered."""
        name, failed = event.upstream, event.outcome in _FAILURES
        if not (failed or self._failing or self._tells_answers):
            return
        tell = log.debug
        if failed and name not in self._failing:
            self._failing.add(name)
            tell = log.warning
        elif event.outcome in ("hit", "absent") and name in self._failing:
            self._failing.discard(name)
            tell = log.info
        tell(
            "upstream fails" if failed else "upstream answers",
            upstream=name,
            what=event.what,
            outcome=event.outcome,
            reason=event.reason,
        )


def _log_fetch(event: FetchEnded) -> None:
    about = {"what": event.what, "upstream": event.upstream, "size": event.size}
    if event.error is None:
        log.info("fetched", **about, seconds=round(event.seconds, 3))
    else:
        log.warning("fetch failed", **about, reason=event.error)


def _log_reload(event: ConfigReloaded) -> None:
    if event.error is None:
        log.info("the configuration was read again and is in force")
    else:
        log.error(
            "the new configuration was not taken; the old one is in force", reason=event.error
        )
