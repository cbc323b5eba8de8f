"""An executor of PTX in NumPy, for what compilers make of kernels: see tests/test_ptx_kernels.py."""
