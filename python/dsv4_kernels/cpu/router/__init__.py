"""The CPU implementation of the router."""
