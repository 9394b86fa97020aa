"""Other replay buffers, in an environment of their own, measured beside Touchline."""
