"""Cases, baselines and definitions of the activation stash."""
