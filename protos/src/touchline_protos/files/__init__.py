"""What the files of a spool and of a durable store have in common."""
