"""Cases, baselines and definitions of the compressed cache."""
