"""What the TPU compiler says of kernels without a TPU."""
