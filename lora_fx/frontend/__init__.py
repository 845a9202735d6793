"""From a module, or an ExportedProgram, to a graph in normal form that computes the same."""
