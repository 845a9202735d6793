"""Which nodes of a graph are affine functions of which, and what their weights are."""
