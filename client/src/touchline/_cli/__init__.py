"""The command ``touchline``."""
