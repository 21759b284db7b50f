"""The CPU implementation of the compressed cache."""
