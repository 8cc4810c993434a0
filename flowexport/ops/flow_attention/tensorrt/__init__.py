"""The fused kernel: CUDA C++ for TensorRT and for direct launches, executed on the host in tests."""
