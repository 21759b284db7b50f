"""The CPU implementation of the activation stash."""
