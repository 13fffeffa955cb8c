"""Every architecture of the installed transformers, small, with random weights and eager attention: what is fused, and how exact."""
