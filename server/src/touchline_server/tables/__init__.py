"""Tables: a name, a configuration, and a store with its selectors, limiter, and seeds."""
