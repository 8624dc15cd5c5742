"""Which samples the benchmarks quote."""

from bench.probes import FAR, FEWEST, PART, SLOWED, Probe, Sample, best, shortest_pulse, undisturbed, worse

PULSE, HOP = 1e-6, FAR / 2
QUIET, SLOW, APART = Probe(PULSE, HOP), Probe(2 * SLOWED * PULSE, HOP), Probe(PULSE, 2 * FAR)


def test_quotes_undisturbed_samples_alone_where_they_are_enough():
    samples = [Sample(seconds, probe) for seconds, probe in ((1.0, QUIET), (2.0, SLOW), (3.0, APART))] * FEWEST
    pulse = shortest_pulse([{"a": samples}])
    assert pulse == PULSE
    assert undisturbed(samples, pulse) == FEWEST
    assert best(samples, pulse) == [1.0] * FEWEST


def test_quotes_the_least_disturbed_part_where_they_are_too_few():
    samples = [Sample(1.0, QUIET), *[Sample(2.0, SLOW)] * 10 * FEWEST, *[Sample(3.0, APART)] * 10 * FEWEST]
    quoted = best(samples, PULSE)
    assert quoted == [1.0] + [2.0] * (round(PART * len(samples)) - 1)


def test_quotes_what_there_is():
    assert best([Sample(1.0, APART)], PULSE) == [1.0]


def test_probes_on_both_sides_count():
    assert worse(SLOW, APART) == Probe(SLOW.pulse, APART.hop)
