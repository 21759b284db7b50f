"""Cases, baselines and definitions of the router."""
