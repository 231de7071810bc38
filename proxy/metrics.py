"""Prometheus: an observer of events, and gauges that are read when somebody looks.

Labels are bounded: routes, methods, statuses, results, kinds and configured names. Nothing that a client
or an upstream makes up becomes a label.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxy import __version__
from proxy.errors import TrustError
from proxy.events import (
    AskedAhead,
    BreakerClosed,
    BreakerOpened,
    ConfigReloaded,
    Event,
    Evicted,
    FastlaneServed,
    Fault,
    FetchedAhead,
    FetchEnded,
    FetchingAhead,
    FetchStarted,
    Forgotten,
    Mode,
    ModeChanged,
    Published,
    Quarantined,
    Rejected,
    RequestServed,
    Result,
    StoreChanged,
    StoreFailed,
    UpstreamAnswered,
    WorkerEnded,
)

PREFIX = "nix_cache_proxy"

METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS"})
"""Methods that are a label of their own; a client can make up any other."""


class Metrics:
    """What is counted. An instance is an `proxy.events.Observer`.

    Args:
        upstreams: Configured names, so that their series exist before anything happens.
    """

    def __init__(self, upstreams: Sequence[str]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and nobody asks for them
        self._registry = CollectorRegistry(auto_describe=True)
        self._requests = self._counter(
            "requests", "Requests answered.", ("route", "method", "code", "result")
        )
        self._bytes = self._counter(
            "response_bytes", "Bytes of bodies sent to clients.", ("result",)
        )
        self._aborted = self._counter(
            "responses_cut", "Answers that ended before their end, by either side."
        )
        self._upstream_requests = self._counter(
            "upstream_requests", "Questions to upstreams.", ("upstream", "kind", "outcome")
        )
        self._upstream_bytes = self._counter(
            "upstream_bytes", "Bytes of files fetched from upstreams.", ("upstream",)
        )
        self._mode = Gauge(
            f"{PREFIX}_mode",
            "1 for the mode that is in force.",
            ("mode",),
            registry=self._registry,
        )
        self._upstream_up = Gauge(
            f"{PREFIX}_upstream_up",
            "0 while an upstream has failed and is left alone.",
            ("upstream",),
            registry=self._registry,
        )
        self._breaker_opened = self._counter(
            "upstream_breaker_opened", "Times that an upstream was left alone.", ("upstream",)
        )
        self._ahead = self._counter("prefetched_bytes", "Bytes of NARs fetched ahead of clients.")
        self._ahead_asked = self._counter(
            "prefetched_asked_bytes", "Those of them that a client has asked for."
        )
        self._rejected = self._counter(
            "verification_failures", "Things that were not what was signed.", ("kind",)
        )
        self._store_failures = self._counter("store_failures", "Times that the local disk failed.")
        self._store_writable = Gauge(
            f"{PREFIX}_store_writable",
            "1 while the local disk keeps what is fetched; else clients are served uncached.",
            registry=self._registry,
        )
        self._store_writable.set(1)
        self._quarantined = self._counter(
            "quarantined", "Things in the store that were not what had been put there."
        )
        self._faults = self._counter("faults", "Faults of the proxy itself.")
        self._restarts = self._counter(
            "worker_restarts", "Workers that ended by themselves, and were started again."
        )
        self._evicted = self._counter("evictions", "Files removed to make room.")
        self._evicted_bytes = self._counter("evicted_bytes", "Bytes on disk freed by that.")
        self._reload = Gauge(
            f"{PREFIX}_config_last_reload_successful",
            "1 when the configuration on disk is the one in force.",
            registry=self._registry,
        )
        self._reload.set(1)
        self._reload_time = Gauge(
            f"{PREFIX}_config_last_reload_success_timestamp_seconds",
            "When a configuration came into force.",
            registry=self._registry,
        )
        self._reload_time.set_to_current_time()
        Gauge(f"{PREFIX}_build_info", "The version.", ("version",), registry=self._registry).labels(
            __version__
        ).set(1)
        self._processes = _Processes()
        self._registry.register(self._processes)
        for name in upstreams:
            for kind in ("narinfo", "nar", "file"):
                for outcome in ("hit", "absent"):
                    self._upstream_requests.labels(name, kind, outcome)
            self._upstream_bytes.labels(name)
            self._upstream_up.labels(name).set(1)
            self._breaker_opened.labels(name)
        for failure in trust_kinds():
            self._rejected.labels(failure)
        for result in get_args(Result):
            self._bytes.labels(result)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export a number that is read when somebody scrapes."""
        Gauge(f"{PREFIX}_{name}", text, registry=self._registry).set_function(read)

    def count_processes(self, pids: Callable[[], Iterable[int]]) -> None:
        """Add other processes of ours to the ``process_*`` metrics."""
        self._processes.others = pids

    def render(self) -> tuple[bytes, str]:
        """Write the metrics in Prometheus' text format; with its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if type(event) in _UNCOUNTED:
            return
        match event:
            case RequestServed():
                self._count_request(event)
            case FastlaneServed(route, code, result, requests, body_bytes):
                self._requests.labels(route, "GET", code, result).inc(requests)
                if result:
                    self._bytes.labels(result).inc(body_bytes)
            case UpstreamAnswered(upstream, asked, _, outcome, _):
                self._upstream_requests.labels(upstream, asked, outcome).inc()
            case FetchEnded(_, upstream, size):
                self._upstream_bytes.labels(upstream).inc(size)
            case FetchedAhead(_, size):
                self._ahead.inc(size)
            case AskedAhead(_, size):
                self._ahead_asked.inc(size)
            case Rejected(_, _, kind, _):
                self._rejected.labels(kind).inc()
            case _:
                self._count_rare(event)

    def _count_rare(self, event: Event) -> None:
        match event:
            case BreakerOpened() | BreakerClosed() | ModeChanged():
                self._count_health(event)
            case StoreFailed():
                self._store_failures.inc()
            case Quarantined():
                self._quarantined.inc()
            case StoreChanged(reason):
                self._store_writable.set(not reason)
            case Evicted(_, size):
                self._evicted.inc()
                self._evicted_bytes.inc(size)
            case Fault():
                self._faults.inc()
            case WorkerEnded():
                self._restarts.inc()
            case ConfigReloaded(error):
                self._reload.set(error is None)
                if error is None:
                    self._reload_time.set_to_current_time()
            case _:
                pass

    def _count_health(self, event: BreakerOpened | BreakerClosed | ModeChanged) -> None:
        match event:
            case BreakerOpened(upstream):
                self._upstream_up.labels(upstream).set(0)
                self._breaker_opened.labels(upstream).inc()
            case ModeChanged(mode):
                for each in get_args(Mode):
                    self._mode.labels(each).set(each == mode)
            case BreakerClosed(upstream):
                self._upstream_up.labels(upstream).set(1)

    def _count_request(self, event: RequestServed) -> None:
        method = event.method if event.method in METHODS else "other"
        self._requests.labels(event.route, method, event.code, event.result).inc()
        if event.result:
            self._bytes.labels(event.result).inc(event.body_bytes)
        if not event.complete:
            self._aborted.inc()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)


_UNCOUNTED = frozenset({FetchStarted, FetchingAhead, Forgotten, Published})
"""Events that come often, and that no metric is made of."""


class _Processes(Collector):
    """The ``process_*`` metrics, as sums over all our processes; the start is that of this one."""

    def __init__(self) -> None:
        self.others: Callable[[], Iterable[int]] = tuple

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; a process that ends meanwhile has none."""
        totals = {metric.name: metric for metric in _of_process("self")}
        for pid in self.others():
            for metric in _of_process(pid):
                if metric.name in _SUMS:
                    _add(totals[metric.name], sum(sample.value for sample in metric.samples))
        if "process_cpu_seconds" in totals:  # else a worker's end would turn the clock back
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            _add(totals["process_cpu_seconds"], ended.ru_utime + ended.ru_stime)
        yield from totals.values()


_SUMS = frozenset(
    {
        "process_cpu_seconds",
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
    }
)


def _of_process(pid: int | str) -> Iterable[Metric]:
    return ProcessCollector(pid=lambda: pid, registry=None).collect()


def _add(metric: Metric, value: float) -> None:
    metric.samples = [sample._replace(value=sample.value + value) for sample in metric.samples]


def trust_kinds() -> Iterator[str]:
    """Return every kind of verification failure there is."""
    return (failure.kind for failure in TrustError.__subclasses__())
