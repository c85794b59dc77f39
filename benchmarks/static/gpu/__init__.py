"""What the GPU compilers say of kernels without a GPU."""
