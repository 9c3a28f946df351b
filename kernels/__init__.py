"""GPU kernels written in Triton; nothing here is imported until a CUDA model is loaded."""
