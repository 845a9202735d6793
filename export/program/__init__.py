"""The program behind a file: traced or not, its signature, its inputs, its weights."""
