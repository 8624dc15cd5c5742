"""Benchmarks: fastbn beside PyTorch, JAX, oneDNN and the fastest copy of the same bytes.

pip install --group bench -e .
python -m bench                 measure everything, store bench/results/kernels.json, then report
python -m bench -k 56x56        measure some of it and print it (arguments are pytest's)
python -m bench.report          stored figures -> README table, bench/results/README.md and picture
"""
