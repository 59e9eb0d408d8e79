"""Settings of the whole suite. Helpers are in `building.py` and `moving.py` beside this file."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "shardsim",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardsim")
