"""What else the machine does while something is timed, and which samples that has spoilt.

A host lends virtual CPUs, and neither `/proc` nor any clock tells what it does with them besides. Two probes do, in
20 us. A *pulse* of plain instructions takes longer while another machine computes on the same cores, and so does all
that does not wait for memory (on Zen 4 a call on (32, 64) 9.4 and 15.5 us, the pulse 6 and 9). A *hop* from one thread
to the other takes longer while they lie on two dies, which write to memory twice as fast as one (a hop 30 and 150 ns, a
streaming copy of 103 MB 4.8 and 3.0 ms). Both change from one tenth of a second to the next, or not for a minute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench import native

FAR = 9e-8  # seconds: a longer hop is to another die
SLOWED = 1.25  # times the shortest pulse: a longer one is disturbed (at different clock rates it is up to 1.2)
FEWEST = 9  # samples that are enough
PART = 0.4  # of the samples that is quoted where too few are undisturbed


class Probe(NamedTuple):
    """How the machine is: seconds."""

    pulse: float
    hop: float


class Sample(NamedTuple):
    """Seconds a call, and the worse of the probes before and behind it."""

    seconds: float
    probe: Probe


Samples = dict[str, list[Sample]]


def probe() -> Probe:
    """How the machine is now."""
    pulse, hop = ctypes.c_double(), ctypes.c_double()
    native.library().probe(ctypes.byref(pulse), ctypes.byref(hop))
    return Probe(pulse.value, hop.value)


def worse(one: Probe, other: Probe) -> Probe:
    """The longer pulse and the longer hop."""
    return Probe(*map(max, one, other))


def shortest_pulse(measured: Iterable[Samples]) -> float:
    """Seconds of the pulse when nobody disturbs it, if that has ever been so."""
    return min(sample.probe.pulse for samples in measured for values in samples.values() for sample in values)


def undisturbed(samples: Sequence[Sample], pulse: float) -> int:
    """Number of the samples on one die whose pulse was about the shortest."""
    return sum(sample.probe.hop <= FAR and sample.probe.pulse <= SLOWED * pulse for sample in samples)


def best(samples: Sequence[Sample], pulse: float) -> list[float]:
    """Seconds of all undisturbed samples, or of the least disturbed part where they are too few."""
    enough = undisturbed(samples, pulse)
    if enough < FEWEST:
        enough = max(FEWEST, round(PART * len(samples)))
    ranked = sorted(samples, key=lambda sample: (sample.probe.hop > FAR, sample.probe.pulse))
    return [sample.seconds for sample in ranked[:enough]]
