"""Values that both sides speak of."""
