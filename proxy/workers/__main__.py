"""The process that `proxy.workers.supervisor` starts; of no use to anybody else."""

from __future__ import annotations

from proxy.workers.worker import main

if __name__ == "__main__":
    main()
