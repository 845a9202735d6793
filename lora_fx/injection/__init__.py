"""Where an adapter meets a graph: bound, conformed, emitted, matched, read back."""
