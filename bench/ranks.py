"""What training over MPI ranks costs: steps on 1 and more ranks, and the collective alone.

    python -m bench.ranks             measure, store bench/results/ranks.json, print the tables
    python -m bench.ranks --tables    print the tables of the stored results

A step is a layer's forward and backward on 32 samples a rank, one thread each. The collective is what each of the two
does: an Allgather of 4 + 2 * C float64 a rank. Ranks beyond the processors share them ("oversubscribed"), and wait for
each other's turns. The model of what it costs beyond, ``alpha * log2(P) + beta * (P - 1) * bytes``, is that of
recursive doubling (Thakur, Rabenseifner and Gropp, 2005): latency once a doubling, and every other rank's packet. It
is fitted, by least squares of relative errors, to the ranks that have a processor each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import stored
from bench.stored import markdown

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = (64, 256, 1024, 2048)
SHAPES = {"small": (32, 64, 8, 8), "large": (32, 64, 56, 56), "many channels": (32, 2048, 7, 7)}
SECONDS = 0.4  # of calls for each time
BEYOND = (4, 16, 64, 256)
ROUND = 8  # calls between two looks at the clock


def median_microseconds(comm, call) -> float:
    """Time calls on all ranks together, as the first rank sees them: every rank makes the same number."""
    for _ in range(ROUND):
        call()
    times = []
    end = time.perf_counter() + SECONDS
    while comm.bcast(time.perf_counter() < end):
        comm.Barrier()
        for _ in range(ROUND):
            begin = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure_here() -> None:
    """Measure on every rank, print on the first."""
    from mpi4py import MPI

    import fastbn

    comm = MPI.COMM_WORLD
    fastbn.set_num_threads(1)
    steps, collectives = {}, {}
    for name, shape in SHAPES.items():
        x = np.random.default_rng(comm.Get_rank()).standard_normal(shape, np.float32)
        out, dx = np.empty_like(x), np.empty_like(x)
        for kind, layer in (("comm", fastbn.BatchNorm2d(shape[1], comm=comm)), ("alone", fastbn.BatchNorm2d(shape[1]))):

            def step(layer=layer, x=x, out=out, dx=dx) -> None:
                layer(x, out=out)
                layer.backward(x, out=dx)

            steps[f"{name}, {kind}"] = median_microseconds(comm, step)
    for channels in CHANNELS:
        packet = np.zeros(4 + 2 * channels)
        table = np.empty((comm.Get_size(), packet.size))
        collectives[channels] = median_microseconds(
            comm, lambda packet=packet, table=table: comm.Allgather(packet, table)
        )
    if comm.Get_rank() == 0:
        print(json.dumps({"steps": steps, "collectives": collectives}))


def measure() -> dict:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mpiexec = Path(sys.executable).with_name("mpiexec")
    ranks = {}
    for number in sorted({1, 2, cpus, 2 * cpus}):
        command = [str(mpiexec), "-n", str(number), sys.executable, "-m", "mpi4py", "-m", "bench.ranks", "--rank"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=ROOT).stdout
        ranks[number] = json.loads(output) | {"oversubscribed": number > cpus}
    return {"cpus": cpus, "load": os.getloadavg()[0], "ranks": ranks}


def model(results: dict) -> tuple[float, float]:
    """Fit alpha in microseconds a doubling, and beta in microseconds a byte."""
    rows = [
        (np.log2(int(number)), (int(number) - 1) * 8 * (4 + 2 * int(channels)), microseconds)
        for number, row in results["ranks"].items()
        if int(number) > 1 and not row["oversubscribed"]
        for channels, microseconds in row["collectives"].items()
    ]
    table = np.array(rows, float)
    alpha, beta = np.linalg.lstsq(table[:, :2] / table[:, 2:], np.ones(len(table)), rcond=None)[0]
    return float(alpha), float(beta)


def tables(results: dict) -> str:
    ranks = results["ranks"]
    names = [f"{n} rank{'s' * (n != '1')}{' (oversubscribed)' * row['oversubscribed']}" for n, row in ranks.items()]
    steps = []
    for name, shape in SHAPES.items():
        for kind in ("comm", "alone"):
            cells = [f"{row['steps'][f'{name}, {kind}'] / 1e3:.2f}" for row in ranks.values()]
            steps.append([f"{'x'.join(map(str, shape))}, {'`comm=`' if kind == 'comm' else 'no `comm`'}", *cells])
    alpha, beta = model(results)
    collectives = []
    for channels in CHANNELS:
        cells = [f"{row['collectives'][str(channels)]:.0f}" for n, row in ranks.items() if n != "1"]
        size = 8 * (4 + 2 * channels)
        cells += [f"{alpha * np.log2(p) + beta * (p - 1) * size:.0f}" for p in BEYOND]
        collectives.append([f"C = {channels}", *cells])
    heads = ["collective, microseconds", *names[1:], *(f"model, {p}" for p in BEYOND)]
    said = (
        f"{results['cpus']} processors, load {results['load']:.1f} before. Model of one machine's shared memory, "
        f"fitted to 2 ranks and more: {alpha:.1f} us * log2(P) + {1e3 * beta:.3f} ns * (P - 1) * bytes."
    )
    return "\n\n".join((markdown(["step of 32 samples a rank, ms", *names], steps), markdown(heads, collectives), said))


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        measure_here()
    else:
        stored.main(__doc__, "ranks", measure, tables)
