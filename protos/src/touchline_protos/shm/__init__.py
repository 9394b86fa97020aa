"""Memory that two processes share."""
