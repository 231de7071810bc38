"""``serve``: run the daemon in the foreground."""

from __future__ import annotations

import asyncio

from proxy import collector
from proxy.cli.options import (
    ConfigFile,
    Listen,
    StorePath,
    TrustedKeys,
    Upstreams,
    configuration,
)
from proxy.config import Config


def serve(
    config: ConfigFile = None,
    listen: Listen = None,
    store: StorePath = None,
    upstream: Upstreams = None,
    trusted_key: TrustedKeys = None,
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the configuration again."""

    def read() -> Config:
        return configuration(config, listen, store, upstream, trusted_key)

    first = read()
    with collector.resting():  # takes long, and no other command needs it
        from proxy.cli.daemon import Daemon  # noqa: PLC0415
        from proxy.cli.logs import set_up_logs  # noqa: PLC0415
    set_up_logs(first.log)
    asyncio.run(Daemon(first, read).run())
