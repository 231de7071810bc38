"""The process that `proxy.porter.porter` starts; of no use to anybody else."""

from __future__ import annotations

from proxy import collector


def main() -> None:
    """Import what it takes, and run."""
    with collector.resting():
        from proxy.porter import process  # noqa: PLC0415

    process.main()


if __name__ == "__main__":
    main()
