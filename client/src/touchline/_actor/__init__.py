"""An actor's side: rows become episodes, episodes wait in a queue, and a thread sends them."""
