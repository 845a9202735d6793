"""Bytes: files that nobody vouches for are read, files are written whole or not at all."""
