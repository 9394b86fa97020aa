"""The web page, its JSON API and the health check by HTTP: a thread of its own, below the gRPC service and without knowledge of it."""
