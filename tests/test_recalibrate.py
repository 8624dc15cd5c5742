"""Recalibration: running statistics that are exactly those of all batches seen inside the block."""

from __future__ import annotations

import copy
import doctest
import runpy
from pathlib import Path

import numpy as np
import pytest

import fastbn
import fastbn.recalibration
from fastbn import BatchNorm1d, BatchNorm2d, recalibrate

pytestmark = pytest.mark.usefixtures("backend")

SIZES = (7, 1, 0, 12, 3, 1)


def batches(channels: int = 3, *, mean: float = 5.0, shape: tuple[int, ...] = ()) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [mean + rng.standard_normal((n, channels, *shape)) * np.arange(1, n + 1).reshape(-1, 1) for n in SIZES]


def state_of(bn: BatchNorm1d) -> tuple[object, ...]:
    return (bn.training, bn._detour, *((key, value.tobytes()) for key, value in bn.state_dict().items()))


def assert_pooled(bn: BatchNorm1d, data: list[np.ndarray], rtol: float = 1e-12) -> None:
    x = np.concatenate(data)
    np.testing.assert_allclose(bn.running_mean, x.mean(0), rtol=rtol)
    np.testing.assert_allclose(bn.running_var, x.var(0, ddof=1), rtol=rtol)
    assert bn.num_batches_tracked == sum(len(batch) > 0 for batch in data)


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("training", (True, False))
def test_statistics_are_pooled_whatever_the_sizes(training, momentum):
    bn = BatchNorm1d(3, momentum=momentum, dtype=np.float64).train(training)
    bn.running_mean[:], bn.num_batches_tracked = 7, 70
    with recalibrate(bn):
        assert bn.training
        for batch in batches():
            y = bn(batch)
            if len(batch):
                np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
            assert bn.num_batches_tracked == 70
    assert_pooled(bn, batches())
    assert bn.training is training


def test_a_far_mean_costs_no_digits():
    bn = BatchNorm1d(3, dtype=np.float64)
    data = batches(mean=1e6)
    with recalibrate([bn]):
        for batch in data:
            bn(batch)
    assert_pooled(bn, data, 1e-9)


def test_pytorch_agrees_where_it_can(torch):
    """Its cumulative average is the pooled mean for batches of one size; its variances are another matter."""
    data = [batch for batch in batches() if len(batch) == 12] * 2
    bn, peer = BatchNorm1d(3, dtype=np.float64), torch.nn.BatchNorm1d(3, momentum=None).double()
    with recalibrate(bn):
        for batch in data:
            bn(batch)
    for batch in data:
        peer(torch.tensor(batch))
    np.testing.assert_allclose(bn.running_mean, peer.running_mean, rtol=1e-12)
    assert bn.num_batches_tracked == int(peer.num_batches_tracked)


def test_one_value_is_normalised_to_the_bias():
    bn = BatchNorm1d(3)
    bn.bias[:] = 1, 2, 3
    with recalibrate(bn):
        np.testing.assert_array_equal(bn(np.full((1, 3), 9, np.float32)), [[1, 2, 3]])
        np.testing.assert_array_equal(bn.backward(np.ones((1, 3), np.float32)), 0)
        bn(np.zeros((1, 3), np.float32))
    np.testing.assert_array_equal(bn.running_var, 40.5)
    with pytest.raises(ValueError, match="more than 1 value"):
        bn(np.zeros((1, 3), np.float32))


def test_backward_inside_is_that_of_training():
    bn = BatchNorm1d(3, dtype=np.float64)
    batch = batches()[0]
    bn(batch)
    expected = bn.backward(batch**2)
    with recalibrate(bn):
        bn(batch)
        np.testing.assert_array_equal(bn.backward(batch**2), expected)


def test_several_layers_by_name_twice_and_more_than_once_a_step():
    data = [batch for batch in batches() if len(batch) > 1]
    a, b = BatchNorm1d(3, dtype=np.float64).eval(), BatchNorm1d(3, dtype=np.float64)
    with recalibrate({"a": a, "b": b, "again": a}):
        for batch in data:
            b(a(batch))
            a(2 * batch)
    assert_pooled(a, data + [2 * batch for batch in data])
    assert b.num_batches_tracked == len(data)
    assert (a.training, b.training) == (False, True)


def test_blocks_inside_blocks():
    bn, data = BatchNorm1d(3, dtype=np.float64), batches()
    with recalibrate(bn):
        bn(data[0])
        with recalibrate(iter([bn])):
            bn(data[3])
        assert_pooled(bn, data[3:4])
        bn(data[4])
    assert_pooled(bn, [data[0], data[3], data[4]])
    assert bn._detour is None


def test_only_training_forwards_count():
    bn, data = BatchNorm1d(3, dtype=np.float64), batches()
    with recalibrate(bn):
        bn(data[0])
        bn.eval()(data[3])
        bn.train()
    assert_pooled(bn, data[:1])


@pytest.mark.parametrize("error", (KeyError, KeyboardInterrupt))
def test_after_an_error_all_is_as_before(error):
    layers = [BatchNorm1d(3).eval(), BatchNorm1d(3)]
    for bn in layers:
        bn.train()(batches()[0])
    layers[0].eval()
    before = [state_of(bn) for bn in layers]
    with pytest.raises(error), recalibrate(layers):  # noqa: PT012  # the block is what is tested
        for bn in layers:
            bn(batches()[3])
            bn.running_mean[:], bn.num_batches_tracked = 9, 9
            bn.eval()
        layers[1].reset_running_stats()
        raise error
    assert [state_of(bn) for bn in layers] == before


def test_bad_input_inside_leaves_the_pool_alone():
    bn, data = BatchNorm1d(3, dtype=np.float64), batches()
    with recalibrate(bn):
        bn(data[0])
        with pytest.raises(ValueError, match="expected 3 channels"):
            bn(data[0][:, :2])
    assert_pooled(bn, data[:1])


@pytest.mark.parametrize(
    "layers, name", (({"first": 0, "last": 1}, "last"), ([0, 1], "layer 1")), ids=("mapping", "list")
)
def test_a_layer_that_saw_nothing_says_so(layers, name):
    pair = BatchNorm1d(3), BatchNorm1d(3).eval()
    before = state_of(pair[1])
    chosen = {key: pair[i] for key, i in layers.items()} if isinstance(layers, dict) else [pair[i] for i in layers]
    text = f"no batch was seen by {name};"
    with pytest.warns(UserWarning, match=text) as caught, recalibrate(chosen):  # noqa: PT031
        pair[0](batches()[0])
        pair[1](batches()[2])  # empty
    assert caught[0].filename == __file__
    assert state_of(pair[1]) == before
    assert pair[0].num_batches_tracked == 1


def test_one_value_in_all_is_refused():
    layers = BatchNorm1d(3), BatchNorm1d(3)
    before = [state_of(bn) for bn in layers]
    with pytest.raises(ValueError, match="layer 1 saw one value"), recalibrate(layers):  # noqa: PT012
        layers[0](batches()[0])
        layers[1](batches()[1])
    assert [state_of(bn) for bn in layers] == before


@pytest.mark.parametrize(
    "wrong, error, text",
    (
        (BatchNorm1d(3, track_running_stats=False), ValueError, "layer 1 has none"),
        (fastbn.GhostBatchNorm(3), TypeError, "layer 1 of type GhostBatchNorm"),
        (fastbn.ScaleShift([1.0], [2.0]), TypeError, "layer 1 of type ScaleShift"),
        ("bn", TypeError, "layer 1 of type str"),
    ),
)
def test_other_layers_are_refused_before_anything_changes(wrong, error, text):
    bn = BatchNorm1d(3).eval()
    with pytest.raises(error, match=text), recalibrate([bn, wrong]):
        raise AssertionError("the block was entered")
    assert not bn.training
    with pytest.raises(TypeError, match="got 3"), recalibrate(3):
        pass


def test_recalibrated_is_what_inference_uses():
    bn, x = BatchNorm2d(3, activation="relu"), np.random.default_rng(0).standard_normal((6, 3, 5, 5), np.float32)
    bn.running_mean[:] = 5
    with recalibrate(bn):
        expected = bn(x)
        assert copy.deepcopy(bn)._detour is None
    np.testing.assert_allclose(bn.eval()(x), expected, rtol=0.02, atol=1e-5)


def test_example():
    results = doctest.testmod(fastbn.recalibration, extraglobs={"fastbn": fastbn})
    assert results.attempted
    assert not results.failed


def test_example_after_weight_averaging(monkeypatch, capsys):
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(examples)
    runpy.run_path(str(examples / "recalibrate.py"), run_name="__main__")
    trained, averaged, recalibrated = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert recalibrated > 0.9
    assert recalibrated > max(trained, averaged)


def test_a_communicator_cannot_be_assigned_within():
    bn = fastbn.BatchNorm2d(3)
    x = np.random.default_rng(0).standard_normal((8, 3, 4, 4))
    with fastbn.recalibrate(bn):
        bn(x)
        with pytest.raises(RuntimeError, match="within recalibrate"):
            bn.comm = None
        bn(2 * x)
    assert bn.num_batches_tracked == 2
    bn.comm = None
