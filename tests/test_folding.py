"""Folding arrays: against PyTorch in eval mode, in every dtype, and what is refused."""

from __future__ import annotations

import copy
import warnings

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import fold_conv, fold_into_next_conv, fold_linear, fold_scale_shift, fold_state_dict

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
SHAPES = {1: (7,), 2: (6, 5), 3: (4, 5, 3)}


def norm(channels, seed=0, dtype=np.float64, **more):
    """Return a batch norm as a mapping with PyTorch's keys, with scales of both signs."""
    rng = np.random.default_rng(seed)
    values = {
        "weight": rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        "bias": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    return {key: value.astype(dtype) for key, value in values.items()} | more


def normal(*shape, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def apply(torch, x, bn):
    """Apply a batch norm in eval mode."""
    keys = ("running_mean", "running_var", "weight", "bias")
    values = [None if bn.get(key) is None else torch.from_numpy(bn[key]) for key in keys]
    return torch.nn.functional.batch_norm(x, *values, eps=bn.get("eps", 1e-5))


# --- against PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("groups, inputs, outputs", ((1, 4, 6), (1, 5, 5), (2, 4, 6), (4, 4, 4), (4, 4, 8)))
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_fold_conv(torch, rank, groups, inputs, outputs, transposed, bias):
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight, x = normal(*shape, *[2, 3, 1][:rank]), torch.from_numpy(normal(2, inputs, *SHAPES[rank], seed=3))
    offset, bn = normal(outputs, seed=2) if bias else None, norm(outputs, eps=1e-3)
    conv = getattr(torch.nn.functional, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")

    def run(w, b):
        return conv(x, torch.from_numpy(w), None if b is None else torch.from_numpy(b), groups=groups)

    folded = fold_conv(weight, offset, bn, groups=groups, transposed=transposed)
    torch.testing.assert_close(run(*folded), apply(torch, run(weight, offset), bn), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", (True, False))
def test_fold_linear(torch, bias):
    weight, offset, x = normal(6, 4), normal(6, seed=2) if bias else None, torch.from_numpy(normal(3, 4, seed=3))
    bn = norm(6)
    linear = torch.nn.functional.linear
    folded_weight, folded_bias = map(torch.from_numpy, fold_linear(weight, offset, bn))
    expected = apply(torch, linear(x, torch.from_numpy(weight), torch.from_numpy(offset) if bias else None), bn)
    torch.testing.assert_close(linear(x, folded_weight, folded_bias), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("groups, inputs, outputs", ((1, 4, 6), (2, 4, 6), (4, 4, 8)))
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_fold_into_next_conv(torch, rank, groups, inputs, outputs, bias):
    weight, x = normal(outputs, inputs // groups, *[2, 3, 1][:rank]), torch.from_numpy(normal(2, inputs, *SHAPES[rank]))
    offset, bn = normal(outputs, seed=2) if bias else None, norm(inputs)
    conv = getattr(torch.nn.functional, f"conv{rank}d")

    def run(x, w, b):
        return conv(x, torch.from_numpy(w), None if b is None else torch.from_numpy(b), groups=groups)

    folded = fold_into_next_conv(bn, weight, offset, groups=groups)
    torch.testing.assert_close(run(x, *folded), run(apply(torch, x, bn), weight, offset), rtol=0, atol=1e-12)


# --- what a batch norm may be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("affine, bias", ((True, True), (True, False), (False, False)))
def test_layer_and_mapping_give_the_same(training, affine, bias):
    layer = fastbn.BatchNorm2d(6, eps=1e-2, affine=affine, bias=bias)
    state = {key: value for key, value in norm(6, dtype=np.float32).items() if key in layer.state_dict()}
    layer.load_state_dict(state)
    layer.train(training)
    weight = normal(6, 4, 3, 3, dtype=np.float32)
    for one, other in zip(fold_conv(weight, None, layer), fold_conv(weight, None, {**state, "eps": 1e-2}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_eps_of_a_mapping_is_1e_5_where_absent():
    bn, weight = norm(6), normal(6, 4)
    for one, other in zip(fold_linear(weight, None, bn), fold_linear(weight, None, {**bn, "eps": 1e-5}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scale_and_shift():
    bn = norm(6)
    mean, var, weight, bias = (bn[key] for key in ("running_mean", "running_var", "weight", "bias"))
    scale, shift = fold_scale_shift(mean, var, weight, bias, 1e-3)
    np.testing.assert_allclose(scale, weight / np.sqrt(var + 1e-3), rtol=1e-15)
    np.testing.assert_allclose(shift, bias - mean * scale, rtol=1e-15)
    scale, shift = fold_scale_shift(mean, var)
    np.testing.assert_allclose(scale, 1 / np.sqrt(var + 1e-5), rtol=1e-15)
    np.testing.assert_allclose(shift, -mean * scale, rtol=1e-15)
    assert fold_scale_shift([0.0], [4.0], eps=0)[0] == [0.5]


def test_layer_with_an_activation_does_not_go_behind():
    bn = fastbn.BatchNorm2d(4, activation="relu")
    with pytest.raises(ValueError, match="an activation stands between"):
        fold_into_next_conv(bn, normal(6, 4, 3, 3), None)
    assert fold_conv(normal(4, 2, 3, 3), None, bn)[0].shape == (4, 2, 3, 3)


# --- precision -------------------------------------------------------------------------------------------------------


def rounded(exact, dtype):
    """Round float64 to a dtype correctly, by choosing the nearest of the neighbours, ties to even."""
    near = exact.astype(dtype)
    bits = near.view(f"u{near.dtype.itemsize}").astype(np.int64)
    candidates = np.stack([bits + step for step in (-1, 0, 1)]).astype(f"u{near.dtype.itemsize}").view(dtype)
    distance = np.abs(candidates.astype(np.float64) - exact)
    odd = candidates.view(f"u{near.dtype.itemsize}") & 1
    best = np.lexsort((odd, distance), axis=0)[0]
    return np.take_along_axis(candidates, best[None], axis=0)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_computed_in_float64_and_rounded_once(dtype):
    weight, bias, bn = normal(64, 32, 3, dtype=dtype), normal(64, seed=5, dtype=dtype), norm(64, dtype=np.float32)
    wide = {key: value.astype(np.float64) for key, value in bn.items()}
    scale = wide["weight"] * (1 / np.sqrt(wide["running_var"] + 1e-5))
    exact_weight = weight.astype(np.float64) * scale[:, None, None]
    exact_bias = (bias.astype(np.float64) - wide["running_mean"]) * scale + wide["bias"]
    folded_weight, folded_bias = fold_conv(weight, bias, bn)
    assert folded_weight.dtype == folded_bias.dtype == dtype
    if dtype == np.float64:
        np.testing.assert_array_equal(folded_weight, exact_weight)
        np.testing.assert_array_equal(folded_bias, exact_bias)
    else:
        np.testing.assert_array_equal(folded_weight, rounded(exact_weight, dtype))
        np.testing.assert_array_equal(folded_bias, rounded(exact_bias, dtype))


def test_bfloat16_is_not_rounded_twice():
    """Through float32 this product would fall on a tie that is none."""
    weight = np.ones((1, 1, 1), ml_dtypes.bfloat16)
    bn = {"running_mean": np.zeros(1), "running_var": np.ones(1), "eps": 0.0}
    for value, expected in ((1 + 2**-8 + 2**-40, 1 + 2**-7), (1 + 2**-8, 1.0), (-1 - 2**-8 - 2**-40, -1 - 2**-7)):
        folded, _ = fold_conv(weight, None, {**bn, "weight": np.array([value])})
        assert folded.astype(np.float64).item() == expected


def test_a_mean_that_cancels_costs_no_digits():
    bn = {"running_mean": np.array([1e8], np.float32), "running_var": np.array([1e-6], np.float32), "eps": 0.0}
    _, bias = fold_linear(np.ones((1, 1), np.float32), np.array([1e8 + 8], np.float32), bn)
    assert bias == pytest.approx(8e3, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_neither_modified_nor_returned(dtype):
    weight, bias, bn = normal(4, 4, 3, dtype=dtype), normal(4, dtype=dtype), norm(4, dtype=np.float32)
    before = copy.deepcopy((weight, bias, bn))
    for array in (weight, bias, *bn.values()):
        array.flags.writeable = False
    results = [
        *fold_conv(weight, bias, bn),
        *fold_into_next_conv(bn, weight, bias),
        *fold_linear(weight[..., 0], bias, bn),
    ]
    for result in results:
        assert result.flags.writeable
        assert not any(np.shares_memory(result, array) for array in (weight, bias, *bn.values()))
    for one, other in zip((weight, bias, *bn.values()), (before[0], before[1], *before[2].values()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_any_layout_in_memory_gives_the_same():
    weight, bn = normal(6, 4, 3, 3), norm(6)
    expected, _ = fold_conv(weight, None, bn)
    strided = np.repeat(weight, 2, axis=1)[:, ::2]
    for same in (np.asfortranarray(weight), strided, weight[::-1].copy()[::-1]):
        np.testing.assert_array_equal(fold_conv(same, None, bn)[0], expected)


# --- overflow and underflow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, large", ((np.float16, 1e4), (ml_dtypes.bfloat16, 1e38), (np.float32, 1e38), (np.float64, 1e308))
)
def test_overflow_names_the_channels(dtype, large):
    weight = np.full((4, 4, 1), 10, dtype)
    bn = norm(4, weight=np.array([1, large, 1, large]))
    name = np.dtype(dtype).name
    with pytest.raises(OverflowError, match=rf"overflow {name} in channels 1, 3$"):
        fold_conv(weight, None, bn)
    with pytest.raises(OverflowError, match=rf"overflow {name} in channels 1, 3$"):
        fold_conv(weight.transpose(1, 0, 2), None, bn, transposed=True)
    with pytest.raises(OverflowError, match=rf"overflow {name} in channels 0, 1, 2, 3$"):
        fold_into_next_conv(bn, weight, None)
    with pytest.raises(OverflowError, match=rf"overflow {name} in channels 2, 3$"):
        fold_into_next_conv({**bn, "weight": np.array([1, 1, 1, large])}, weight[:, :2], None, groups=2)


def test_overflow_of_the_bias_and_of_scale_and_shift():
    bn = norm(3, bias=np.array([0, 0, 1e5]))
    with pytest.raises(OverflowError, match=r"channel 2$"):
        fold_linear(np.ones((3, 2), np.float16), None, bn)
    with pytest.raises(OverflowError, match=r"scale and shift overflow float32 in channel 0$"):
        fold_scale_shift(np.zeros(2), np.ones(2), np.array([1, 1], np.float32), np.array([1e39, 1.0]))
    with pytest.raises(OverflowError, match=r"channels 0, 1, 2, 3, 4, 5, 6, 7 and 12 more$"):
        fold_linear(
            np.full((20, 2), 6e4, np.float16), None, {"running_mean": np.zeros(20), "running_var": np.full(20, 0.1)}
        )


def test_what_was_not_finite_before_passes():
    weight = np.ones((3, 2), np.float16)
    weight[0, 0] = np.inf
    bn = norm(3)
    bn["running_mean"][1] = np.nan
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        folded, bias = fold_linear(weight, None, bn)
    assert not np.isfinite(folded[0, 0])
    assert np.isnan(bias[1])
    assert np.isfinite(folded[1:]).all()
    assert np.isfinite(bias[2])


def test_float16_underflow_warns():
    bn = norm(3, weight=np.array([1, 1e-7, 0.0]))
    with pytest.warns(RuntimeWarning, match=r"lose digits in channel 1$") as caught:
        fold_linear(np.ones((3, 2), np.float16), None, bn)
    assert caught[0].filename == __file__


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: fold_conv(normal(6, 4, 3), None, norm(5)), ValueError, r"5 channels.*\(6, 4, 3\) gives 6"),
        (lambda: fold_conv(normal(6, 4, 3), None, norm(6), transposed=True), ValueError, "6 channels.* gives 4"),
        (lambda: fold_conv(normal(6, 4, 3), normal(4), norm(6)), ValueError, r"bias must have shape \(6,\).*\(4,\)"),
        (lambda: fold_conv(normal(6, 4), None, norm(6)), ValueError, r"at least three axes, got shape \(6, 4\)"),
        (lambda: fold_conv(normal(6, 4, 3), None, norm(6), groups=4), ValueError, r"groups=4 and shape \(6, 4, 3\)"),
        (lambda: fold_conv(normal(6, 4, 3), None, norm(6), groups=0), ValueError, "groups=0"),
        (
            lambda: fold_conv(normal(6, 4, 3), None, norm(6), groups=1.0),
            TypeError,
            "groups must be an integer, got .*float",
        ),
        (lambda: fold_linear(normal(6, 4, 3), None, norm(6)), ValueError, r"two axes, got shape \(6, 4, 3\)"),
        (lambda: fold_into_next_conv(norm(5), normal(6, 4, 3), None), ValueError, "5 channels.* takes 4"),
        (lambda: fold_into_next_conv(norm(4), normal(6, 4, 3), None, groups=2), ValueError, "groups=2 takes 8"),
        (
            lambda: fold_linear(np.ones((6, 4), int), None, norm(6)),
            TypeError,
            "weight must be one of float16.*got int64",
        ),
        (lambda: fold_linear(normal(6, 4), np.ones(6, complex), norm(6)), TypeError, "bias must be.*got complex128"),
        (lambda: fold_linear(normal(6, 4), None, {**norm(6), "bias": np.ones(6, bool)}), TypeError, "bias.*got bool"),
        (
            lambda: fold_linear(normal(6, 4), None, [1, 2]),
            TypeError,
            "bn must be a batch norm layer or a mapping.*list",
        ),
        (lambda: fold_linear(normal(6, 4), None, {}), ValueError, "running_mean and running_var missing"),
        (
            lambda: fold_linear(normal(6, 4), None, fastbn.BatchNorm1d(6, track_running_stats=False)),
            ValueError,
            "missing",
        ),
        (
            lambda: fold_linear(normal(6, 4), None, norm(6, eps=-1e-5)),
            ValueError,
            "eps must be finite and not negative",
        ),
        (lambda: fold_linear(normal(6, 4), None, norm(6, eps=np.nan)), ValueError, "eps.*got nan"),
        (lambda: fold_linear(normal(6, 4), None, norm(6, eps="1e-5")), TypeError, "eps must be a number, got '1e-5'"),
        (lambda: fold_linear(normal(6, 4), None, norm(6, running_var=np.zeros(6), eps=0)), ValueError, "channels 0, 1"),
        (lambda: fold_linear(normal(6, 4), None, norm(6, bias=np.zeros(4))), ValueError, r"\(6,\) and bias \(4,\)"),
        (lambda: fold_scale_shift(np.zeros(3), np.ones(4)), ValueError, r"mean has shape \(3,\) and var \(4,\)"),
        (lambda: fold_scale_shift(np.zeros((3, 1)), np.ones(3)), ValueError, r"mean must have shape \(C,\).*\(3, 1\)"),
        (lambda: fold_scale_shift(np.zeros(3), np.array([1, -1, 1.0])), ValueError, "not in channel 1"),
    ),
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def state_of(torch, network):
    """Return the arrays of a network whose batch norms are not trivial."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for value in (module.running_mean, module.weight, module.bias):
                torch.nn.init.normal_(value)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return {key: value.numpy().copy() for key, value in network.state_dict().items()}


def test_fold_state_dict(torch):
    nn = torch.nn
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, 5),
        nn.BatchNorm1d(5),
    ).double()
    state = state_of(torch, network)
    before = copy.deepcopy(state)
    folded = fold_state_dict(state, [("0", "1"), ("3", "4"), ("6", "7")], transposed=["3"])
    assert list(folded) == ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias"]
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Identity(),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, 5),
    ).double()
    plain.load_state_dict({key: torch.from_numpy(value) for key, value in folded.items()})
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plain(x), network.eval()(x), rtol=0, atol=1e-12)
    for key, value in before.items():
        np.testing.assert_array_equal(state[key], value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_state_dict_keeps_dtypes_and_what_it_does_not_fold(dtype):
    state = {"a.weight": normal(4, 3, 3, 3, dtype=dtype), "other": np.arange(3)}
    state |= {f"n.{key}": value for key, value in norm(4, dtype=dtype).items()} | {"n.num_batches_tracked": np.array(3)}
    folded = fold_state_dict(state, [("a", "n")], eps=1e-3)
    assert list(folded) == ["a.weight", "a.bias", "other"]
    assert folded["other"] is state["other"]
    expected = fold_conv(state["a.weight"], None, {**{k: state[f"n.{k}"] for k in norm(1)}, "eps": 1e-3})
    for key, value in zip(("a.weight", "a.bias"), expected, strict=True):
        assert folded[key].dtype == dtype
        np.testing.assert_array_equal(folded[key], value)


def test_one_norm_behind_two_layers():
    state = {"a.weight": normal(4, 3), "b.bias": normal(4), "b.weight": normal(4, 3, seed=4)}
    state |= {f"n.{key}": value for key, value in norm(4).items()}
    folded = fold_state_dict(state, iter([("a", "n"), ("b", "n")]))
    assert list(folded) == ["a.weight", "a.bias", "b.bias", "b.weight"]


@pytest.mark.parametrize(
    "pairs, options, message",
    (
        ([("a", "m"), ("c", "n")], {}, "missing from the state: c.weight, m.running_mean, m.running_var"),
        ([("a", "n"), ("a", "n")], {}, "paired twice: a"),
        (["an"], {}, "each of pairs .* got 'an'"),
        ([("a",)], {}, "each of pairs"),
        ([("b", "n")], {}, "b and n: the batch norm has 4 channels.* gives 5"),
        ([("a", "n")], {"transposed": ["b"]}, "in no pair: b"),
        ([("a", "n")], {"transposed": ["a"]}, r"no multiple of what a transposed weight of shape \(4, 3\)"),
        ([("a", "n")], {"eps": -1}, "a and n: eps"),
    ),
)
def test_bad_state(pairs, options, message):
    state = {"a.weight": normal(4, 3), "b.weight": normal(5, 3)}
    state |= {f"n.{key}": value for key, value in norm(4).items()}
    with pytest.raises(ValueError, match=message):
        fold_state_dict(state, pairs, **options)


def test_keys_of_a_state_that_are_no_names_are_kept():
    state = {0: 1, "a.weight": normal(4, 3)} | {f"n.{key}": value for key, value in norm(4).items()}
    assert list(fold_state_dict(state, [("a", "n")])) == [0, "a.weight", "a.bias"]


def test_statistics_of_one_number_are_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"mean must have shape \(C,\), got \(\)"):
        fold_scale_shift(np.float32(0), np.float32(1))


def test_layers_without_channels():
    """As pruning leaves them."""
    none = norm(0)
    assert [array.shape for array in fold_conv(normal(0, 3, 2), None, none)] == [(0, 3, 2), (0,)]
    assert [array.shape for array in fold_conv(normal(3, 0, 2), None, none, transposed=True)] == [(3, 0, 2), (0,)]
    assert [array.shape for array in fold_linear(normal(0, 3), np.zeros(0), none)] == [(0, 3), (0,)]
    assert [array.shape for array in fold_into_next_conv(norm(4), normal(0, 4, 1), None)] == [(0, 4, 1), (0,)]
    state = {"a.weight": normal(3, 0, 2)} | {f"n.{key}": value for key, value in none.items()}
    assert fold_state_dict(state, [("a", "n")], transposed=["a"])["a.bias"].shape == (0,)


def test_overflow_in_a_state_names_the_layer():
    state = {"a.weight": np.full((2, 3), 6e4, np.float16)} | {
        f"n.{k}": v for k, v in norm(2, weight=np.ones(2) * 9).items()
    }
    with pytest.raises(OverflowError, match=r"^a and n: .*channels 0, 1"):
        fold_state_dict(state, [("a", "n")])
