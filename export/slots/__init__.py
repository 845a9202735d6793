"""Adapters as inputs of a swappable model: slots, the manifest, adapter files."""
