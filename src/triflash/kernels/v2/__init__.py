"""FlashAttention-2 (arXiv:2307.08691) in Triton, for every GPU that Triton targets."""
