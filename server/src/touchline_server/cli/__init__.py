"""The command ``touchline-server``."""
