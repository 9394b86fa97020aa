"""Episodes in memory: columns, index, schema, and how rows are read while others are written."""
