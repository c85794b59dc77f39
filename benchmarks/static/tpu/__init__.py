"""Static examination of TPU kernels by libtpu."""
