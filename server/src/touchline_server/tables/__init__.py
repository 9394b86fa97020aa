"""Tables: a name, a configuration, and a store with its selectors, limiter, seeds and change signal."""
