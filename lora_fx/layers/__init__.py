"""Which layers a graph or a model has, how each type is called and stored, and where it is."""
