"""An actor's queue on its own disk."""
