"""Settings of the property tests."""

from __future__ import annotations

from hypothesis import settings

# A machine busy with parallel tests takes its time; pytest-timeout catches what really hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
