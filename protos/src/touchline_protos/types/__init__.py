"""Values that client and server share: batches, episodes, counts, dtypes, and the rules for names and columns."""
