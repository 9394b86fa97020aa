"""Totals, rolling windows and histograms of what the server does. Knows nothing of tables, gRPC or messages."""
