"""What a graph must compute, said without the graph: the module, run with W' in place of W."""
