"""Whether a file computes what the model does, and whether the check could have failed."""
