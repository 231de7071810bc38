"""The daemon: the parts put together, and what signals do to them."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from proxy import __version__, collector
from proxy.cache import Cache
from proxy.cli import assembly, systemd
from proxy.cli.front import Front, Workers, one_process, setup
from proxy.cli.handlers import DaemonCommands, StoreCommands
from proxy.cli.logs import EventLog, log
from proxy.cli.operations import Operations
from proxy.cli.upkeep import keep_whole
from proxy.config import Config, UnixListen
from proxy.control.server import taking_commands
from proxy.errors import ConfigError, ListenError
from proxy.events import BreakerClosed, ConfigReloaded, Event, Fault, Mode, ModeChanged, Observer
from proxy.failover import Failover
from proxy.metrics import Metrics
from proxy.pins import FromUpstreams, Pins
from proxy.porter.porter import Porter
from proxy.prefetch import Prefetch
from proxy.server.listening import Address
from proxy.store.eviction import Limits
from proxy.store.folder import Store
from proxy.upstream.breaker import State
from proxy.workers.service import Core
from proxy.workers.supervisor import supervised


class Daemon:
    """One running proxy.

    Args:
        config: What to start with.
        read_config: Reads the configuration again, for SIGHUP; raises `ConfigError`.
    """

    def __init__(self, config: Config, read_config: Callable[[], Config]) -> None:
        self._config = config
        self._read_config = read_config
        self._metrics = Metrics([upstream.name for upstream in config.upstreams])
        self._observers: list[Observer] = [self._metrics, EventLog()]
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._hang_up = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal says stop.

        Raises:
            ConfigError: The configuration cannot be used after all.
            StoreError: The store folder cannot be used, or another daemon has it.
            ListenError: An address cannot be listened on.
        """
        asyncio.get_running_loop().set_exception_handler(self._on_fault)
        self._obey_signals()
        _raise_file_limit()
        async with (
            contextlib.aclosing(Porter(self._observe)) as porter,
            self._store(porter) as store,
            self._cache(store, porter) as cache,
            self._prefetch(cache) as prefetch,
        ):
            operations = Operations(
                lambda: self._config, lambda: self._failover, store, self._metrics
            )
            core = Core(cache, prefetch, self._observe, operations)
            async with (
                self._front(core, operations) as front,
                self._commands(store, cache, front),
            ):
                collector.settle()
                log.info(
                    "ready",
                    version=__version__,
                    listen=front.addresses,
                    store=str(store.layout.root),
                )
                systemd.notify("READY=1")
                self._observe(ModeChanged(self._config.policy.mode))
                await self._obey(front, core)

    def _observe(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)

    def _on_fault(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the event loop has to say of tasks and callbacks whose errors nobody took."""
        error = context.get("exception")
        trace = "".join(traceback.format_exception(error)) if error else ""
        self._observe(Fault(str(context["message"]), trace))

    def _obey_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up.set)

    def _on_stop(self) -> None:
        """Stop; whoever asks a second time does not want to wait."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    @contextlib.asynccontextmanager
    async def _store(self, porter: Porter) -> AsyncIterator[Store]:
        cache_info = assembly.cache_info(self._config)
        limits = Limits(self._config.store.max_size, self._config.store.min_free)
        store = Store(self._config.store.path, cache_info, self._observe, limits, porter.publisher)
        self._metrics.gauge(
            "store_bytes", "Bytes on disk, as du counts them.", lambda: store.totals.bytes
        )
        self._metrics.gauge("store_paths", "Store paths kept.", lambda: store.totals.paths)
        self._metrics.gauge(
            "store_scanned", "1 when what is kept has been counted.", lambda: store.scanned
        )
        try:
            yield store
        finally:
            await store.close()

    @contextlib.asynccontextmanager
    async def _cache(self, store: Store, porter: Porter) -> AsyncIterator[Cache]:
        self._porter = porter
        self._metrics.count_processes(lambda: filter(None, (porter.pid,)))
        self._failover = await assembly.failover(self._config, self._observe, porter)
        cache = Cache(
            store,
            self._failover,
            negative_ttl=self._config.policy.negative_ttl,
            observer=self._observe,
        )
        self._metrics.gauge(
            "fetches_in_flight", "Downloads under way.", lambda: cache.fetches_in_flight
        )
        try:
            yield cache
        finally:
            await cache.close()
            await asyncio.gather(*self._retiring)
            await self._failover.close()

    @contextlib.asynccontextmanager
    async def _prefetch(self, cache: Cache) -> AsyncIterator[Prefetch]:
        prefetch = Prefetch(cache, assembly.look_ahead(self._config))
        self._metrics.gauge(
            "prefetched_unasked_bytes",
            "Bytes fetched ahead of clients that none has asked for.",
            lambda: cache.ahead.unasked_bytes,
        )
        try:
            yield prefetch
        finally:
            await prefetch.close()

    @contextlib.asynccontextmanager
    async def _front(self, core: Core, operations: Operations) -> AsyncIterator[Front]:
        config, addresses = self._config, self._addresses()
        if config.server.workers == 1:
            async with one_process(config, core, addresses, hurry=self._hurry) as front:
                yield front
            return
        async with supervised(
            core, addresses, config.server.workers, setup(config), hurry=self._hurry
        ) as supervisor:
            self._observers.append(supervisor.observe)
            self._metrics.count_processes(
                lambda: filter(None, (*supervisor.pids, self._porter.pid))
            )
            operations.collect = supervisor.flush
            await self._unless_stopped(supervisor.all_listen())
            yield Workers(supervisor)

    @contextlib.asynccontextmanager
    async def _commands(self, store: Store, cache: Cache, front: Front) -> AsyncIterator[None]:
        """Let commands reach us; where there can be no socket, we serve all the same."""
        pins = Pins(store, FromUpstreams(cache, store), store.limits)
        looking = asyncio.create_task(keep_whole(pins))
        commands = DaemonCommands(
            StoreCommands(store, pins),
            cache,
            failover=lambda: self._failover,
            mode=lambda: self._config.policy.mode,
            set_mode=lambda mode: self.set_mode(mode, front),
            listen=front.addresses,
        ).table()
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(
                    taking_commands(store.layout.control, commands, self._observe)
                )
            except ListenError as error:
                log.warning("commands cannot reach this daemon", reason=str(error))
            try:
                yield
            finally:
                looking.cancel()

    def _addresses(self) -> Sequence[Address]:
        """Where to listen: on what systemd opened for us, or else where the configuration says."""
        addresses: list[Address] = [*systemd.inherited_sockets()] or [
            listen.path if isinstance(listen, UnixListen) else (listen.host, listen.port)
            for listen in self._config.server.listen
        ]
        if not addresses:
            raise ListenError("server.listen is empty, and systemd passed no socket")
        return addresses

    async def _obey(self, front: Front, core: Core) -> None:
        """Reload on SIGHUP, until it is time to stop."""
        stop = asyncio.create_task(self._stop.wait())
        while not stop.done():
            hang_up = asyncio.create_task(self._hang_up.wait())
            await asyncio.wait((stop, hang_up), return_when=asyncio.FIRST_COMPLETED)
            hang_up.cancel()
            if self._hang_up.is_set():
                self._hang_up.clear()
                systemd.notify_reloading()
                await self._reload(front, core)
                systemd.notify("READY=1")
        log.info("stopping", transfers_may_take=f"{self._config.server.shutdown_timeout:g} s")
        systemd.notify("STOPPING=1")

    async def _reload(self, front: Front, core: Core) -> None:
        """Take a new configuration whole, or not at all."""
        try:
            config = self._read_config()
            failover = await assembly.failover(config, self._observe, self._porter)
        except ConfigError as error:
            self._observe(ConfigReloaded(str(error)))
            return
        for name in ("server", "store", "log"):
            if getattr(config, name) != getattr(self._config, name):
                log.warning("a change to this table takes a restart", table=name)
        retired, self._failover, self._config = self._failover, failover, config
        for source in retired.sources:
            if source.upstream.breaker.state is not State.CLOSED:
                self._observe(
                    BreakerClosed(source.upstream.name)
                )  # who is asked now has not failed
        core.cache.use(failover, negative_ttl=config.policy.negative_ttl)
        core.prefetch.configure(assembly.look_ahead(config))
        await front.use(config)
        self._observe(ModeChanged(config.policy.mode))
        retiring = asyncio.create_task(_retire(retired, core.cache))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        self._observe(ConfigReloaded(None))

    async def set_mode(self, mode: Mode, front: Front) -> None:
        """Treat upstreams otherwise, until the configuration is read again."""
        policy = replace(self._config.policy, mode=mode)
        self._config = replace(self._config, policy=policy)
        self._failover.asker.offline = mode == "offline"
        await front.use(self._config)
        self._observe(ModeChanged(mode))

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work, or leave it when it is time to stop."""
        tasks = (asyncio.create_task(work), asyncio.create_task(self._stop.wait()))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def _retire(failover: Failover, cache: Cache) -> None:
    """Close upstreams once nobody uses them: neither who asked them, nor what came of that."""
    for _ in range(2):  # who asked, and the fetches that they started
        if tasks := cache.tasks:
            await asyncio.wait(tasks)
    await failover.close()


def _raise_file_limit() -> None:
    """Allow as many open files as we may: every client and every file on its way takes one or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
