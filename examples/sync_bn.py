"""Train over MPI ranks, batch norm included: ``mpiexec -n 2 python examples/sync_bn.py``.

Every rank works on its part of each batch. With ``comm=`` the layers normalise with the statistics of the whole batch,
so the result does not depend on the number of ranks: it is that of one rank, up to rounding.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from spirals import Network, loss_and_gradient, spirals

BATCH, STEPS, RATE = 48, 300, 0.2


def main() -> None:
    """Train, and say on the first rank how it goes."""
    comm = MPI.COMM_WORLD
    network = Network(comm=comm)
    x, labels = spirals(2000, seed=1)
    rng = np.random.default_rng(2)  # the same choice of samples on every rank
    for step in range(STEPS):
        batch = rng.integers(0, len(x), BATCH)
        mine = np.array_split(batch, comm.Get_size())[comm.Get_rank()]
        loss, dy = loss_and_gradient(network(x[mine]), labels[mine], BATCH)
        for parameter, gradient in zip(network.parameters, network.gradients(dy), strict=True):
            comm.Allreduce(MPI.IN_PLACE, gradient)  # a rank's gradients are its part of the whole batch's
            np.subtract(parameter, RATE * gradient, out=parameter)
        total = comm.allreduce(loss)
        if step % 100 == 99 and comm.Get_rank() == 0:
            print(f"step {step + 1}: loss {total:.3f}")
    accuracy = network.accuracy(*spirals(1000, seed=3))
    states = comm.gather([bn.running_var.tobytes() for bn in network.norms])
    if comm.Get_rank() == 0:
        same = "the same" if all(state == states[0] for state in states) else "NOT the same"
        print(f"accuracy {accuracy:.3f} on {comm.Get_size()} ranks, whose running statistics are {same} to the bit")


if __name__ == "__main__":
    main()
