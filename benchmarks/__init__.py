"""Touchline's benchmarks: ``make bench`` and ``make bench-peers``. What is measured, and how, is in ``docs/benchmarks/``."""
