"""The fused kernel in CUDA C++, for TensorRT and for direct launches.

Why CUDA C++ and not Triton: the kernel must be *executed* where there is no
GPU, and shipped where there is no compiler. This source is written as blocks
of phases, so a C++ compiler turns the very same tiling, reductions and carry
logic into a host library that tests check against float64 (Triton's
interpreter executes Triton's semantics, not the code a GPU would run, and its
cubins need ptxas at build time and scratch arguments at run time). nvcc
compiles it ahead for every supported compute capability into one library with
a plain C interface that needs the driver alone.

What the host build cannot execute: shuffles, barriers, conversions and fast
exponentials of the GPU itself (each one wrapper in ``cuda/block.h`` or
``cuda/row.h``, with a host twin in the same order of rounding).
"""
