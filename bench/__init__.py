"""Benchmarks: fastbn beside PyTorch, JAX, oneDNN and the fastest copy of the same bytes.

pip install --group dev -e .
python -m bench                 measure everything, store bench/results/kernels.json, then report
python -m bench -k 56x56        measure some of it and print it (arguments are pytest's)
python -m bench.report          stored figures -> README table, bench/results/README.md and picture

The rest is run in the same way, each for a table of its own: bench.folding, bench.image_statistics, bench.ranks and
bench.numerics.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the table of cases, models and graphs
