"""The variants against independent implementations by PyTorch's automatic differentiation, and their own rules."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from cases import DTYPES, Case
from reference import assert_close

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

LEAKY = ("leaky_relu", 0.1)
# A shape, an activation, and whether there is a residual.
CALLS = (
    (Case((6, 3)), None, True),
    (Case((9, 17), axis=-1), None, False),
    (Case((6, 3, 40)), "relu", False),
    (Case((5, 3, 4, 5)), LEAKY, False),
    (Case((8, 4, 5, 3), axis=-1), "relu", True),
    (Case((4, 3, 2, 3, 4)), LEAKY, True),
)
SHAPES = [case for case, *_ in CALLS]
TOLERANCE = {np.float32: 4e-6, np.float64: 1e-10}


# --- the references, in float64: `forward(x)` takes (N, C, ...) tensors, `state` what the layer's buffers should be ---


class Reference:
    """Weight and bias of its own, as leaves of the graph."""

    def __init__(self, torch, layer):
        self.torch, self.eps, self.momentum = torch, layer.eps, layer.momentum
        self.parameters = {
            name: torch.tensor(value.astype(np.float64), requires_grad=True) for name, value in layer.params.items()
        }
        self.mean = torch.zeros(layer.num_features, dtype=torch.float64)
        self.var = torch.ones(layer.num_features, dtype=torch.float64)

    def affine(self, x_hat):
        shape = (1, -1) + (1,) * (x_hat.ndim - 2)
        for name, operation in (("weight", self.torch.mul), ("bias", self.torch.add)):
            if name in self.parameters:
                x_hat = operation(x_hat, self.parameters[name].reshape(shape))
        return x_hat

    @staticmethod
    def dims(x):
        return (0, *range(2, x.ndim))

    @staticmethod
    def spread(values, x):
        return values.reshape((1, -1) + (1,) * (x.ndim - 2))


class Ghost(Reference):
    """PyTorch's own function on one chunk after the other."""

    def __init__(self, torch, layer):
        super().__init__(torch, layer)
        self.size = layer.virtual_batch_size

    def forward(self, x, training):
        chunks = x.chunk(math.ceil(len(x) / self.size)) if training else (x,)
        weight, bias = (self.parameters.get(name) for name in ("weight", "bias"))
        normalise = self.torch.nn.functional.batch_norm
        parts = [normalise(c, self.mean, self.var, weight, bias, training, self.momentum, self.eps) for c in chunks]
        return self.torch.cat(parts)

    def state(self):
        return {"running_mean": self.mean, "running_var": self.var}


class Renorm(Reference):
    """As published: r and d are constants to the gradient."""

    def __init__(self, torch, layer):
        super().__init__(torch, layer)
        self.layer = layer
        self.std = self.torch.ones_like(self.mean)

    def forward(self, x, training):
        if not training:
            return self.affine((x - self.spread(self.mean, x)) / self.spread(self.std, x))
        mean = x.mean(self.dims(x))
        std = (x.var(self.dims(x), correction=0) + self.eps).sqrt()
        r = (std / self.std).detach().clamp(1 / self.layer.r_max, self.layer.r_max)
        d = ((mean - self.mean) / self.std).detach().clamp(-self.layer.d_max, self.layer.d_max)
        x_hat = (x - self.spread(mean, x)) / self.spread(std, x) * self.spread(r, x) + self.spread(d, x)
        self.mean = self.mean + self.momentum * (mean.detach() - self.mean)
        self.std = self.std + self.momentum * (std.detach() - self.std)
        return self.affine(x_hat)

    def state(self):
        return {"running_mean": self.mean, "running_std": self.std}


class Running(Reference):
    """Debiased averages of sums, sums of squares and counts; the past is a constant to the gradient."""

    def __init__(self, torch, layer):
        super().__init__(torch, layer)
        self.totals = {
            "sums": 0 * self.mean,
            "sqrs": 0 * self.mean,
            "count": 0 * self.mean[0],
            "ones": 0 * self.mean[0],
        }
        self.samples = 0

    def forward(self, x, training):
        totals = self.totals
        if training:
            m = 1 - (1 - self.momentum) / math.sqrt(len(x) - 1)
            count = self.torch.tensor(float(x.numel() / x.shape[1]), dtype=x.dtype)
            sums, sqrs = x.sum(self.dims(x)), x.square().sum(self.dims(x))
            new = {"sums": sums, "sqrs": sqrs, "count": count, "ones": self.torch.ones_like(count)}
            totals = {name: (1 - m) * self.totals[name] + m * new[name] for name in new}
            self.totals = {name: total.detach() for name, total in totals.items()}
            self.samples += len(x)
        sums, sqrs, count = (totals[name] / totals["ones"] for name in ("sums", "sqrs", "count"))
        mean = sums / count
        var = sqrs / count - mean * mean
        if self.samples < 20:
            var = var.clamp(min=0.01)
        return self.affine((x - self.spread(mean, x)) / self.spread((var + self.eps).sqrt(), x))

    def state(self):
        dbias = {"dbias": self.totals["ones"]}
        return {name: self.totals[name] for name in ("sums", "sqrs", "count")} | dbias


class Frozen(Reference):
    """The formula, of the layer's constants."""

    def __init__(self, torch, layer):
        super().__init__(torch, layer)
        self.constants = {key: torch.tensor(value.astype(np.float64)) for key, value in layer.state_dict().items()}

    def forward(self, x, training):
        mean, var, weight, bias = (
            self.spread(self.constants[name], x) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) * (var + self.eps).rsqrt() * weight + bias

    def state(self):
        return self.constants


VARIANTS = {
    "ghost": (fastbn.GhostBatchNorm, Ghost, {"virtual_batch_size": 3, "momentum": 0.3}),
    "renorm": (fastbn.BatchRenorm, Renorm, {"momentum": 0.2}),
    "renorm at its limits": (fastbn.BatchRenorm, Renorm, {"r_max": 1.1, "d_max": 0.2, "eps": 1e-5}),
    "running": (fastbn.RunningBatchNorm, Running, {"momentum": 0.3, "eps": 1e-3}),
    "frozen": (fastbn.FrozenBatchNorm, Frozen, {}),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, case: Case, dtype=np.float32, **options):
    """The layer with parameters that are neither one nor zero."""
    cls, _, own = VARIANTS[name]
    layer = cls(case.channels, axis=case.axis, dtype=dtype, **own, **options)
    rng = np.random.default_rng(3)
    if name == "frozen":
        layer.running_mean[:], layer.running_var[:] = rng.uniform((-1, 0.5), (1, 2), (case.channels, 2)).T
    for key in ("weight", "bias"):
        if getattr(layer, key) is not None:
            getattr(layer, key)[:] = rng.uniform(0.5, 1.5, case.channels)
    return layer


def activated(torch, z, activation):
    match activation:
        case None:
            return z
        case "relu":
            return torch.relu(z)
        case (_, slope):
            return torch.nn.functional.leaky_relu(z, slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, activation, with_residual", CALLS, ids=str)
@each_variant
def test_steps_and_eval_agree_with_an_independent_implementation(torch, name, case, activation, with_residual, dtype):
    layer = make(name, case, dtype, activation=activation)
    peer = VARIANTS[name][1](torch, layer)
    for step in range(4):
        layer.train(step < 3)
        x, dy, residual, *_ = case.make(dtype, seed=step)
        tensor, added = (
            torch.tensor(a.astype(np.float64)).movedim(case.axis, 1).requires_grad_() for a in (x, residual)
        )
        z = peer.forward(tensor, layer.training)
        expected = activated(torch, z + added if with_residual else z, activation)
        expected.backward(torch.tensor(dy.astype(np.float64)).movedim(case.axis, 1))

        y = layer(x, residual=residual if with_residual else None)
        dx = layer.backward(dy)
        assert y.dtype == dtype
        assert_close(y, expected.detach().movedim(1, case.axis).numpy(), TOLERANCE[dtype])
        if with_residual:
            dx, dresidual = dx
            assert_close(dresidual, added.grad.movedim(1, case.axis).numpy(), TOLERANCE[dtype])
        cancels = np.abs(dy).max() * np.abs(layer.weight).max()
        assert_close(dx, tensor.grad.movedim(1, case.axis).numpy(), TOLERANCE[dtype], terms=cancels)
        assert list(layer.grads) == list(layer.params)
        for key, parameter in peer.parameters.items():
            assert layer.grads[key].dtype == dtype
            assert_close(layer.grads[key], parameter.grad.numpy(), TOLERANCE[dtype])
            parameter.grad = None
        for key, value in peer.state().items():
            assert_close(np.asarray(getattr(layer, key), np.float64), value.numpy(), TOLERANCE[dtype])


@each_variant
def test_out_and_in_place_give_the_same_bits(name):
    case = SHAPES[3]
    x, dy, residual, *_ = case.make()
    plain, into, inside = (make(name, case, activation="relu") for _ in range(3))
    y, out, dx_out = plain(x, residual=residual), np.empty_like(x), np.empty_like(x)
    assert into(x, residual=residual, out=out) is out
    np.testing.assert_array_equal(out, y)
    dx, dresidual = plain.backward(dy)
    got, got_residual = into.backward(dy, out=dx_out)
    assert got is dx_out
    np.testing.assert_array_equal(got, dx)
    np.testing.assert_array_equal(got_residual, dresidual)
    over = x.copy()
    assert inside(over, residual=residual, out=over) is over
    np.testing.assert_array_equal(over, y)
    with pytest.raises(RuntimeError, match="overwrote"):
        inside.backward(dy)
    over = dy.copy()
    plain(x, residual=residual)
    assert plain.backward(over, out=over)[0] is over
    plain.eval()(x)
    assert plain.backward(dy) is not dy


@each_variant
@pytest.mark.parametrize("layout", (np.asfortranarray, lambda a: np.ascontiguousarray(a[::-1])[::-1]))
def test_any_layout_gives_what_the_plain_one_gives(name, layout):
    case = SHAPES[3]
    x, dy, residual, *_ = case.make(np.float64)
    plain, laid = (make(name, case, np.float64, activation="relu") for _ in range(2))
    assert_close(laid(layout(x), residual=layout(residual)), plain(x, residual=residual))
    for got, expected in zip(laid.backward(layout(dy)), plain.backward(dy), strict=True):
        assert_close(got, expected)
    out = layout(np.empty_like(x))
    laid(layout(x), residual=residual, out=out)
    assert_close(out, plain(x, residual=residual))


def state_of(layer):
    return {key: value.tolist() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("shape", ((0, 3), (0, 3, 4), (5, 3, 0), (1, 3, 0)), ids=str)
@each_variant
def test_an_empty_batch_changes_nothing(name, shape):
    layer = make(name, Case((6, 3)))
    layer(Case((6, 3)).make().x)
    before = state_of(layer)
    x = np.empty(shape, np.float32)
    for training in (True, False):
        y = layer.train(training)(x)
        assert y.shape == shape
        assert layer.backward(x).shape == shape
        assert all((grad == 0).all() for grad in layer.grads.values())
    assert state_of(layer) == before


@each_variant
def test_nan_and_infinity_stay_in_their_channel(name):
    case = Case((6, 5, 4))
    x, dy, *_ = case.make()
    x[0, 1, 0], x[1, 3, 2] = np.nan, np.inf
    layer = make(name, case)
    for training in (True, False):
        y = layer.train(training)(x)
        dx = layer.backward(dy)
        for values in (y, dx):
            assert np.isfinite(values[:, [0, 2, 4]]).all()
    assert np.isnan(y[0, 1, 0])


@each_variant
def test_states_go_round(name):
    case = SHAPES[2]
    layer, twin = make(name, case), VARIANTS[name][0](3, **VARIANTS[name][2])
    x = case.make().x
    layer(x)
    state = layer.state_dict()
    assert twin.load_state_dict(state) == ([], [])
    for value in state.values():
        value[...] = 9
    assert state_of(twin) == state_of(layer)
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))
        np.testing.assert_array_equal(other.fold()(x), layer(x))
    broken = state_of(layer) | {"unknown": 1}
    del broken["running_mean"]
    kept = state_of(twin)
    with pytest.raises(ValueError, match=r"running_mean.*unknown"):
        twin.load_state_dict(broken)
    assert state_of(twin) == kept
    fresh = VARIANTS[name][0](3, **VARIANTS[name][2])
    layer.reset_parameters()
    assert state_of(layer) == state_of(fresh)
    layer.reset_running_stats()
    assert state_of(layer) == state_of(fresh)


@each_variant
def test_folds_into_a_convolution_as_it_is_in_eval(name):
    case = SHAPES[3]
    layer = make(name, case, np.float64)
    for seed in range(3):
        layer(case.make(np.float64, seed=seed).x)
    conv = np.random.default_rng(0).standard_normal((3, 2, 1, 1))
    weight, bias = fastbn.fold_conv(conv, None, layer)
    images = np.random.default_rng(1).standard_normal((4, 2, 5, 5))
    through = np.einsum("oi,nihw->nohw", conv[:, :, 0, 0], images)
    expected = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], images) + bias[:, None, None]
    assert_close(layer.eval()(through), expected)


@pytest.mark.parametrize("options", ({"affine": False}, {"bias": False}), ids=str)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "frozen"])
def test_without_parameters(torch, name, options):
    case = SHAPES[2]
    layer = make(name, case, np.float64, **options)
    peer = VARIANTS[name][1](torch, layer)
    x, dy, *_ = case.make(np.float64)
    tensor = torch.tensor(x, requires_grad=True)
    expected = peer.forward(tensor, True)
    expected.backward(torch.tensor(dy))
    assert_close(layer(x), expected.detach().numpy())
    assert_close(layer.backward(dy), tensor.grad.numpy(), 1e-9)
    assert list(layer.grads) == list(layer.params) == list(peer.parameters)


# --- each one's own rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "samples, size, sizes",
    ((8, 4, (4, 4)), (9, 4, (3, 3, 3)), (10, 4, (4, 4, 2)), (3, 128, (3,)), (5, 1, (1,) * 5), (7, 3, (3, 3, 1))),
)
def test_virtual_batches_are_cut_as_torch_chunk_does(torch, samples, size, sizes):
    assert [len(c) for c in torch.zeros(samples, 1).chunk(math.ceil(samples / size))] == list(sizes)
    x = Case((samples, 3, 5)).make(np.float64).x
    ghost = fastbn.GhostBatchNorm(3, size, dtype=np.float64)
    bn = fastbn.BatchNorm1d(3, dtype=np.float64)
    parts = [bn(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    np.testing.assert_array_equal(ghost(x), np.concatenate(parts))
    assert state_of(ghost) == state_of(bn)
    assert ghost.num_batches_tracked == len(sizes)


def test_ghosts_average_cumulatively_and_without_tracking():
    x = Case((6, 3, 5)).make().x
    cumulative = fastbn.GhostBatchNorm(3, 2, momentum=None)
    cumulative(x)
    np.testing.assert_allclose(cumulative.running_mean, x.mean((0, 2)), rtol=1e-5)
    assert cumulative.num_batches_tracked == 3
    untracked = fastbn.GhostBatchNorm(3, 2, track_running_stats=False)
    y = untracked(x)
    np.testing.assert_array_equal(untracked.eval()(x), y)
    assert list(untracked.state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match="running"):
        untracked.fold()


def test_ghosts_with_the_channels_first_of_all_cut_the_second_axis():
    x, dy, *_ = Case((6, 3, 5)).make(np.float64)
    swapped, plain = (
        fastbn.GhostBatchNorm(3, 2, axis=0, dtype=np.float64),
        fastbn.GhostBatchNorm(3, 2, dtype=np.float64),
    )
    assert_close(swapped(x.swapaxes(0, 1)).swapaxes(0, 1), plain(x))
    assert_close(swapped.backward(dy.swapaxes(0, 1)).swapaxes(0, 1), plain.backward(dy), 1e-9)


def test_renorm_without_leave_to_correct_is_batch_norm():
    case = SHAPES[3]
    x, dy, *_ = case.make()
    renorm, bn = fastbn.BatchRenorm(3, 1e-5, r_max=1, d_max=0), fastbn.BatchNorm2d(3)
    assert_close(renorm(x), bn(x))
    assert_close(renorm.backward(dy), bn.backward(dy))
    renorm.r_max, renorm.d_max = 3, 5  # as a schedule does
    assert not np.allclose(renorm(x), bn(x), atol=1e-3)


def test_renorm_in_training_is_inference_where_the_limits_allow():
    case = SHAPES[3]
    renorm = fastbn.BatchRenorm(3, momentum=0.5, r_max=1e9, d_max=1e9, dtype=np.float64)
    for seed in range(4):
        x = case.make(np.float64, seed=seed).x
        expected = copy.deepcopy(renorm).eval()(x)
        assert_close(renorm(x), expected)
    assert renorm.num_batches_tracked == 4
    cumulative = fastbn.BatchRenorm(3, momentum=None, dtype=np.float64)
    batches = [case.make(np.float64, seed=seed).x for seed in range(3)]
    for x in batches:
        cumulative(x)
    stds = [np.sqrt(x.var(case.reduced) + 1e-3) for x in batches]
    assert_close(cumulative.running_std, np.mean(stds, 0))


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_renorm_of_infinite_values_warns_nobody(dtype):
    bn = fastbn.BatchRenorm(3)
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(dtype)
    x[0, 0, 0], x[0, 1] = np.inf, np.finfo(dtype).max
    with np.errstate(all="raise"):
        for _ in range(2):
            bn(x)
            bn.backward(x)
    assert bn.num_batches_tracked == 2


def test_running_sums_lose_no_digits():
    """The course's mean square less square of the mean would be off by the whole variance, 1, here."""
    rng = np.random.default_rng(0)
    batches = [1e8 + rng.standard_normal((8, 3, 50)) for _ in range(3)]
    layer = fastbn.RunningBatchNorm(3, dtype=np.float64)
    share, weights = 1 - 0.9 / math.sqrt(7), np.ones(0)
    for x in batches:
        y = layer(x)
        weights = np.append(weights * (1 - share), share)
    whole = np.concatenate(batches).astype(np.longdouble)
    each = np.repeat(weights, 8)[:, None, None]
    mean = (each * whole).sum((0, 2)) / (each.sum() * 50)
    var = (each * (whole - mean[:, None]) ** 2).sum((0, 2)) / (each.sum() * 50)
    np.testing.assert_allclose(layer.running_var, var.astype(float), rtol=1e-7)
    np.testing.assert_allclose(
        y, ((batches[-1] - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]).astype(float), atol=1e-6
    )


def test_running_variance_is_limited_until_twenty_samples_were_seen():
    x = np.linspace(0, 1e-3, 30).reshape(5, 2, 3)
    layer = fastbn.RunningBatchNorm(2, dtype=np.float64)
    for samples in (5, 10, 15):
        dx = (layer(x), layer.backward(np.ones_like(x)))[1]
        assert layer.num_samples_tracked == samples
        assert layer.running_var.tolist() == [0.01, 0.01]
        assert np.isfinite(dx).all()
    layer(x)
    assert (layer.running_var < 1e-6).all()
    assert layer.num_batches_tracked == 4


def test_frozen_takes_the_states_of_the_others(torch):
    case = SHAPES[3]
    bn = fastbn.BatchNorm2d(3)
    bn(case.make().x)
    bn.weight[:] = 2
    frozen = fastbn.FrozenBatchNorm(3)
    assert frozen.load_state_dict(bn.state_dict()) == ([], [])
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    x = case.make(seed=1).x
    before = state_of(frozen)
    y = frozen.train()(x)
    np.testing.assert_array_equal(y, bn.eval()(x))
    assert state_of(frozen) == before
    assert frozen.params == frozen.grads == {}
    assert "num_batches_tracked" not in frozen.state_dict()
    theirs = torch.nn.BatchNorm2d(3)
    assert frozen.load_state_dict(theirs.state_dict()) == ([], [])
    frozen.bias = [1, 2, 3]
    assert frozen.state_dict()["bias"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="missing keys: bias"):
        frozen.load_state_dict({key: value for key, value in bn.state_dict().items() if key != "bias"})


@pytest.mark.parametrize(
    "layer, text",
    (
        (fastbn.GhostBatchNorm(3, 4), "GhostBatchNorm(3, virtual_batch_size=4, eps=1e-05, momentum=0.1, affine=True"),
        (
            fastbn.BatchRenorm(3),
            "BatchRenorm(3, eps=0.001, momentum=0.01, affine=True, bias=True, r_max=3.0, d_max=5.0)",
        ),
        (fastbn.RunningBatchNorm(3), "RunningBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True)"),
        (fastbn.FrozenBatchNorm(3, axis=-1), "FrozenBatchNorm(3, eps=1e-05, axis=-1)"),
    ),
)
def test_repr(layer, text):
    assert repr(layer).startswith(text)


ONE = np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    "call, error, words",
    (
        *(
            case
            for cls in (fastbn.GhostBatchNorm, fastbn.BatchRenorm, fastbn.RunningBatchNorm, fastbn.FrozenBatchNorm)
            for case in (
                (lambda cls=cls: cls(0), ValueError, ("num_features", "0")),
                (lambda cls=cls: cls(3, eps=-1.0), ValueError, ("eps", "-1")),
                (lambda cls=cls: cls(3, dtype=np.int32), TypeError, ("int32",)),
                (lambda cls=cls: cls(3, activation="tanh"), ValueError, ("tanh",)),
                (lambda cls=cls: cls(3)(np.ones(3)), ValueError, ("2 dimensions", "1D")),
                (lambda cls=cls: cls(3)(np.ones((2, 4))), ValueError, ("3", "4", "(2, 4)")),
                (lambda cls=cls: cls(3)(np.ones((2, 3), int)), TypeError, ("int64",)),
                (lambda cls=cls: cls(3, axis=3)(np.ones((2, 3))), ValueError, ("axis", "3")),
                (lambda cls=cls: cls(3).backward(ONE), RuntimeError, ("forward",)),
            )
        ),
        *(
            (lambda cls=cls: cls(3)(ONE), ValueError, words)
            for cls, words in (
                (fastbn.GhostBatchNorm, ("more than 1 value", "(1, 3)")),
                (fastbn.BatchRenorm, ("more than 1 value", "(1, 3)")),
                (fastbn.RunningBatchNorm, ("at least 2 samples", "(1, 3)")),
            )
        ),
        *(
            (lambda cls=cls: cls(3, eps=0.0)(np.ones((2, 3))), ValueError, ("eps", "0"))
            for cls in (fastbn.GhostBatchNorm, fastbn.BatchRenorm, fastbn.RunningBatchNorm)
        ),
        (lambda: fastbn.GhostBatchNorm(3, 0), ValueError, ("virtual_batch_size", "0")),
        (lambda: fastbn.GhostBatchNorm(3, 2.5), TypeError, ("virtual_batch_size", "float")),
        (lambda: fastbn.GhostBatchNorm(3, 2)(np.ones((5, 3))), ValueError, ("5 samples", "of 2", "(5, 3)")),
        (lambda: fastbn.BatchRenorm(3, r_max=0.5), ValueError, ("r_max", "0.5")),
        (lambda: fastbn.BatchRenorm(3, d_max=-1), ValueError, ("d_max", "-1")),
        (lambda: fastbn.BatchRenorm(3, d_max="5"), TypeError, ("d_max", "5")),
        (lambda: fastbn.RunningBatchNorm(3, momentum=None), TypeError, ("momentum", "None")),
        (lambda: fastbn.RunningBatchNorm(3, momentum=0.0), ValueError, ("momentum", "0.0")),
    ),
)
def test_errors_say_what_came(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


@each_variant
def test_bad_input_leaves_the_layer_as_it_was(name):
    case = Case((6, 3))
    layer = make(name, case)
    x, dy, *_ = case.make()
    layer(x)
    before = state_of(layer)
    out = np.full((5, 3), 7.0, np.float32)
    for arguments in (
        {"x": x, "residual": x[:5]},
        {"x": x, "residual": x.astype(np.float64)},
        {"x": x, "out": out},
        {"x": x[:, :2]},
        *([{"x": x[:1], "out": out[:1]}] if name != "frozen" else []),  # one value per channel
    ):
        with pytest.raises((ValueError, TypeError)):
            layer(**arguments)
        assert state_of(layer) == before
        assert (out == 7).all()
    for gradient in (dy[:5], dy.astype(np.float64)):
        with pytest.raises((ValueError, TypeError)):
            layer.backward(gradient)
    assert layer.backward(dy).shape == x.shape  # it still can
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(dy)


def test_a_frozen_layer_s_backward_follows_its_forward():
    bn, x = fastbn.FrozenBatchNorm(3), np.ones((2, 3, 50), np.float32)
    bn.weight = [1, 2, 3]
    bn(x)
    bn.axis = 2
    expected = np.array([1, 2, 3], np.float32)[:, None] / np.sqrt(np.float32(1 + 1e-5)) * x
    np.testing.assert_allclose(bn.backward(x), expected, rtol=1e-6)
