"""FlashAttention-3 for Hopper (arXiv:2407.08608), in Gluon."""
