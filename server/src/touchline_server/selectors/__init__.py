"""The laws by which slices are drawn."""
