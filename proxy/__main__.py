"""``python -m proxy``, and the ``nix-cache-proxy`` command."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; Ctrl-C before it gets a hand on signals ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from proxy import cli  # noqa: PLC0415  # takes a while, and is what Ctrl-C may hit

    cli.main()


if __name__ == "__main__":
    main()
