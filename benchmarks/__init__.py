"""Measurements, arms side by side in one run; `results/` holds their JSON and the tables made from it."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise; read when torch is loaded
