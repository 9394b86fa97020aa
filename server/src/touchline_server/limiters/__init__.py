"""Rate limits: how often what is stored is sampled, by a rule of its own for each table."""
