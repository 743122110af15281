"""FlashAttention's forward in CUDA C++, compiled at the first call by NVRTC."""
