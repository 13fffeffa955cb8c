"""Programs written by chance: attention in plain PyTorch for the pass, score programs for the kernels."""
