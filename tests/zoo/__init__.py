"""Every architecture of the installed transformers, small, with random weights, eager attention: what is fused, how exactly."""
