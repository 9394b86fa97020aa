"""Calls to the server: channel, credentials, deadlines, retries, the log of long waits, forks."""
