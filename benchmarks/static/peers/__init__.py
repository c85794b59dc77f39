"""Static comparison of our TPU kernels with others': same shapes, same compiler, same examination; estimates only."""
