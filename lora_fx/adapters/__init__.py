"""Adapters as values: updates, targets, scaling, initialization, merging, extraction."""
