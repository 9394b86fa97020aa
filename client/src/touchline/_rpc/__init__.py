"""Calls to the server: channel, credentials, deadlines, retries, forks."""
