"""Matrices as expressions: built by smart constructors, evaluated once, as late as possible."""
