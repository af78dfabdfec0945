"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Deadlines and "too slow" measure the machine, not the code: tests share its cores.
settings.register_profile(
    "holdfast", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("holdfast")
