"""Queue of episodes on an actor's own disk."""
