"""The compiled kernels of fastbn: C loops over vectors, called without the GIL. Imports nothing of fastbn."""
