"""The configuration: its keys and bounds, and how they are read and combined."""
