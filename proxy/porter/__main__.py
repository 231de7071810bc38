"""The process that `proxy.porter.porter` starts; of no use to anybody else."""

from __future__ import annotations

from proxy.porter.process import main

if __name__ == "__main__":
    main()
