"""Kernels for processors with AVX512-VNNI and AVX512-BF16, compiled as they are imported.

`matrix` holds weights in few bits, `operations` computes a layer with them, and `attention` reads
keys and values in bfloat16. The other modules hold the kernels, functions that numba compiles.
"""
