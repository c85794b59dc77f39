"""Static examination of GPU kernels by Triton, NVIDIA's assembler and XLA."""
