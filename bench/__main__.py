"""All benchmarks, or those that are named: ``python -m bench hot cold``."""

from __future__ import annotations

from bench import cold, cost, hot, program

program.main(__doc__, hot.PART, cost.PART, cold.PART)
