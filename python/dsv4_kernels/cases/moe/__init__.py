"""Cases, baselines and definitions of the mixture of experts."""
