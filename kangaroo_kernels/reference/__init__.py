"""The operations in PyTorch, one module for each kernel: what the kernels are tested against, and what a CPU runs."""
