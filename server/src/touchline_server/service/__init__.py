"""The gRPC service: calls, streams, limits, access, and the composition root that puts the server together."""
