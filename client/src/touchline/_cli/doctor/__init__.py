"""``touchline doctor``: checks of the way from this machine to a server, and of what holds sampling back."""
