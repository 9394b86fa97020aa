"""Measurements on a machine with a CUDA device."""
