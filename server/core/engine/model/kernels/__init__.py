"""Kernels for processors with AVX512-VNNI and AVX512-BF16, compiled as they are imported.

`matrix` holds weights in int8, `operations` computes a layer with them, and `attention` reads keys
and values in bfloat16. The others hold the kernels, functions that numba compiles.
"""
