"""The compiled kernels of fastbn: C loops over vectors, called from Cython without the GIL. Imports nothing of fastbn."""
