"""The CPU implementation of hyper-connections."""
