"""The CPU implementation of the mixture of experts."""
