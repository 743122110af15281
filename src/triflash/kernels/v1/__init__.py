"""FlashAttention (arXiv:2205.14135) in Triton: in parallel, and in the paper's own loop order."""
