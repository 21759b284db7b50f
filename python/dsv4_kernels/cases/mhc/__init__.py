"""Cases, baselines and definitions of hyper-connections."""
