"""Weights of a file in a few bits: stored so, and held against the numbers that they stand for."""
