"""The step between v1 and v2: v2's forward kernel, and its backward in tiles of plain PyTorch."""
