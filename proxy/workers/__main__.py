"""The process that `proxy.workers.supervisor` starts; of no use to anybody else."""

from __future__ import annotations

from proxy import collector


def main() -> None:
    """Import what it takes, and run."""
    with collector.resting():
        from proxy.workers import worker  # noqa: PLC0415

    worker.main()


if __name__ == "__main__":
    main()
