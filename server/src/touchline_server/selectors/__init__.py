"""Sampling laws: one module for each, and the registry by which configuration, requests and adapters find them by name."""
