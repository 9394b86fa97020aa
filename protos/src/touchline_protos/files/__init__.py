"""Locks, syncing and checksummed SQLite files, for a spool and for a durable store."""
