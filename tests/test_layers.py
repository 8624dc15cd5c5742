"""The layers against PyTorch's, in the same dtype and over several steps; their state, modes and gradients."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from cases import DTYPES, SMALL, Case
from reference import assert_close, numerical_gradient

import fastbn
from fastbn._engine import kernels

pytestmark = pytest.mark.usefixtures("backend")

LAYERS = (Case((6, 3)), Case((6, 3, 5)), Case((4, 3, 5, 6)), Case((4, 5, 6, 3), axis=-1), Case((2, 3, 2, 3, 4)))
OPTIONS = (
    {},
    {"eps": 1e-2, "momentum": 0.3},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": -1.2},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


def make(case: Case, dtype=np.float32, **options) -> fastbn.BatchNorm2d:
    return getattr(fastbn, case.layer)(case.channels, axis=case.axis, dtype=dtype, **options)


def randomised(bn):
    """Give the layer parameters that are neither one nor zero, and running statistics that are neither of the two."""
    rng = np.random.default_rng(3)
    for key, low, high in (("weight", -1.5, 1.5), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
        if (values := getattr(bn, key)) is not None:
            values[:] = rng.uniform(low, high, values.shape)
    return bn


class Peer:
    """PyTorch's layer with the same options and state, spoken to in arrays and in the case's layout."""

    def __init__(self, torch, case, dtype, bn, **options):
        self.torch, self.axis = torch, case.axis
        self.layer = getattr(torch.nn, case.layer)(
            case.channels, dtype=torch.tensor(np.zeros(1, dtype)).dtype, **options
        )
        self.layer.load_state_dict({key: torch.tensor(value) for key, value in bn.state_dict().items()})

    def __call__(self, x):
        self.x = self.torch.tensor(x).movedim(self.axis, 1).requires_grad_()
        self.y = self.layer(self.x)
        return self.y.detach().movedim(1, self.axis).numpy()

    def backward(self, dy):
        self.layer.zero_grad()
        self.y.backward(self.torch.tensor(dy).movedim(self.axis, 1))
        return self.x.grad.movedim(1, self.axis).numpy()

    def state(self):
        return {key: value.numpy() for key, value in self.layer.state_dict().items()}


def assert_same_state(got, expected):
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert_close(got[key], value, 2e-6 if value.dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_three_steps_and_eval_agree_with_pytorch(torch, case, options, dtype):
    bn = randomised(make(case, dtype, **options))
    peer = Peer(torch, case, dtype, bn, **options)
    for step in range(4):
        x, dy, *_ = case.make(dtype, seed=step)
        if step == 3:
            bn.eval()
            peer.layer.eval()
        assert_close(bn(x), peer(x))
        assert_close(bn.backward(dy), peer.backward(dy))
        assert_same_state(bn.state_dict(), peer.state())
        assert list(bn.grads) == list(bn.params) == [name for name, _ in peer.layer.named_parameters()]
        for name, parameter in peer.layer.named_parameters():
            assert_close(bn.grads[name], parameter.grad.numpy())


@pytest.mark.parametrize("case", [case for case in SMALL if case.count > 2], ids=str)  # of two, no gradient is left
def test_training_agrees_with_pytorch_on_every_shape(torch, case):
    bn = randomised(make(case))
    peer = Peer(torch, case, np.float32, bn)
    x, dy, *_ = case.make()
    assert_close(bn(x), peer(x))
    assert_close(bn.backward(dy), peer.backward(dy))
    assert_same_state(bn.state_dict(), peer.state())


@pytest.mark.parametrize("mode", ("train", "eval", "eval without running statistics"))
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_backward_is_the_numerical_gradient(case, mode):
    bn = randomised(make(case, np.float64, momentum=0.0, track_running_stats="without" not in mode))
    bn.train(mode == "train")
    small = Case(tuple(min(n, 3) for n in case.shape), case.axis)
    x, dy, *_ = small.make(np.float64, std=1.0)

    def loss() -> float:
        return float((bn(x) * dy).sum())

    bn(x)
    dx = bn.backward(dy)
    gradients = {name: gradient.copy() for name, gradient in bn.grads.items()}
    assert_close(dx, numerical_gradient(loss, x), 1e-8)
    for name, parameter in bn.params.items():
        assert_close(gradients[name], numerical_gradient(loss, parameter), 1e-8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_goes_to_pytorch_and_back(torch, options):
    case = Case((6, 3, 5))
    bn = randomised(make(case, **options))
    bn(case.make().x)
    theirs = torch.nn.BatchNorm1d(3, **options)
    theirs.load_state_dict({key: torch.tensor(value) for key, value in bn.state_dict().items()})
    back = make(case, **options)
    back.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    assert_same_state(back.state_dict(), bn.state_dict())


def test_state_dict_of_pytorch_tensors_loads(torch):
    theirs = torch.nn.BatchNorm2d(3)
    theirs(torch.tensor(Case((2, 3, 4, 4)).make().x))
    bn = fastbn.BatchNorm2d(3)
    bn.load_state_dict(theirs.state_dict())
    assert_same_state(bn.state_dict(), {key: value.numpy() for key, value in theirs.state_dict().items()})


def test_initial_state_and_reset():
    bn = fastbn.BatchNorm1d(2)
    initial = {
        "weight": [1, 1],
        "bias": [0, 0],
        "running_mean": [0, 0],
        "running_var": [1, 1],
        "num_batches_tracked": 0,
    }
    fresh = copy.deepcopy(bn.state_dict())
    assert {key: value.tolist() for key, value in fresh.items()} == initial
    assert fresh["num_batches_tracked"].dtype == np.int64
    assert fresh["num_batches_tracked"].shape == ()

    bn(np.array([[1, 2], [3, 5]], np.float32))
    bn.weight[:] = 7
    bn.reset_running_stats()
    assert bn.state_dict()["weight"].tolist() == [7, 7]
    assert {key: bn.state_dict()[key].tolist() for key in list(initial)[2:]} == dict(list(initial.items())[2:])

    bn(np.array([[1, 2], [3, 5]], np.float32))
    bn.reset_parameters()  # as in PyTorch: the running statistics too
    assert {key: value.tolist() for key, value in bn.state_dict().items()} == initial


@pytest.mark.parametrize("change", ("state_dict", "loaded"))
def test_states_share_no_memory_with_the_layer(change):
    bn, kept = randomised(fastbn.BatchNorm1d(3)), randomised(fastbn.BatchNorm1d(3)).state_dict()
    state = bn.state_dict()
    if change == "loaded":
        bn = fastbn.BatchNorm1d(3)
        bn.load_state_dict(state)
    for value in state.values():
        value[...] = 9
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, kept[key])


def test_loading_casts_to_the_layer_s_dtype_in_place():
    bn, other = fastbn.BatchNorm1d(3), randomised(fastbn.BatchNorm1d(3, dtype=np.float64))
    weight = bn.weight
    bn.load_state_dict(other.state_dict())
    assert bn.weight is weight is bn.params["weight"]
    assert bn.weight.dtype == bn.running_var.dtype == np.float32
    np.testing.assert_array_equal(bn.running_var, other.running_var.astype(np.float32))


def test_state_without_counter_loads():
    bn, other = fastbn.BatchNorm1d(3), randomised(fastbn.BatchNorm1d(3))
    state = other.state_dict()
    del state["num_batches_tracked"]
    bn.load_state_dict(state)
    np.testing.assert_array_equal(bn.running_mean, other.running_mean)
    assert bn.num_batches_tracked == 0


def test_not_strict_takes_what_fits():
    bn, other = fastbn.BatchNorm1d(3), randomised(fastbn.BatchNorm1d(3))
    bn.load_state_dict({"weight": other.weight, "extra": np.ones(2)}, strict=False)
    np.testing.assert_array_equal(bn.weight, other.weight)
    np.testing.assert_array_equal(bn.bias, [0, 0, 0])


def test_modes():
    bn = fastbn.BatchNorm1d(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert bn.train(False) is bn
    assert not bn.training


def test_gradients_are_assigned_and_parameters_updated_in_place_count():
    case = Case((6, 3, 5))
    x, dy, *_ = case.make()
    bn = randomised(make(case))
    bn(x)
    bn.backward(dy)
    once = {name: gradient.copy() for name, gradient in bn.grads.items()}
    y = bn(x)
    bn.backward(dy)
    for name, gradient in bn.grads.items():
        np.testing.assert_array_equal(gradient, once[name])
    for name in bn.params:
        assert bn.params[name] is getattr(bn, name)
        bn.params[name] -= 0.1 * bn.grads[name]
    assert not np.array_equal(bn(x), y)
    bn.eval()
    y = bn(x)
    bn.weight *= 2
    bn.running_mean += 1
    expected = randomised(make(case)).eval()
    expected.load_state_dict(bn.state_dict())
    assert not np.array_equal(bn(x), y)
    np.testing.assert_array_equal(bn(x), expected(x))


def test_assigned_parameters_are_copied_into_place():
    bn = fastbn.BatchNorm1d(3)
    weight, values = bn.params["weight"], np.array([1.0, 2, 3])
    bn.weight = values
    values[:] = 9
    assert bn.weight is weight
    assert weight.tolist() == [1, 2, 3]
    bn.bias = [4, 5, 6]
    assert bn.params["bias"].tolist() == [4, 5, 6]


def test_backward_follows_the_statistics_of_its_forward():
    case = Case((6, 3, 5))
    x, dy, *_ = case.make(np.float64)
    trained, evaluated = (randomised(make(case, np.float64)) for _ in range(2))
    trained(x)
    dx = trained.eval().backward(dy)
    evaluated.eval()(x)
    assert not np.allclose(dx, evaluated.train().backward(dy))
    assert np.abs(dx.sum((0, 2))).max() < 1e-12  # only the batch's statistics take the mean away


def test_backward_uses_the_weight_and_input_of_its_forward():
    case = Case((6, 3, 5))
    x, dy, *_ = case.make(np.float64)
    bn, twin = (randomised(make(case, np.float64)) for _ in range(2))
    bn(x)
    twin(x.copy())
    np.testing.assert_array_equal(bn.backward(dy), twin.backward(dy))


@pytest.mark.parametrize("layer_dtype, dtype", ((np.float32, np.float64), (np.float64, np.float32)))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_input_of_the_other_dtype_is_computed_in_its_own(torch, layer_dtype, dtype, training):
    case = Case((6, 3, 5))
    x, dy, *_ = case.make(dtype)
    bn = randomised(make(case, layer_dtype)).train(training)
    peer = Peer(torch, case, np.float64, bn)
    peer.layer.train(training)
    expected, expected_dx = peer(x.astype(np.float64)), peer.backward(dy.astype(np.float64))
    y = bn(x)
    dx = bn.backward(dy)
    assert y.dtype == dx.dtype == dtype
    assert {a.dtype for a in (*bn.grads.values(), bn.weight, bn.running_mean, bn.running_var)} == {
        np.dtype(layer_dtype)
    }
    assert_close(y, expected)
    assert_close(dx, expected_dx)
    for name, parameter in peer.layer.named_parameters():
        assert_close(bn.grads[name], parameter.grad.numpy(), 2e-6)


def test_tracking_switched_off_later_is_pytorch_s(torch):
    """Training leaves buffers and counter alone then; eval uses the buffers still."""
    case = Case((6, 3, 5))
    bn = randomised(make(case))
    peer = Peer(torch, case, np.float32, bn)
    bn.track_running_stats = peer.layer.track_running_stats = False
    x, *_ = case.make()
    for training in (True, False):
        bn.train(training)
        peer.layer.train(training)
        assert_close(bn(x), peer(x))
        assert_same_state(bn.state_dict(), peer.state())


def test_cumulative_average_skips_empty_batches():
    bn = fastbn.BatchNorm1d(2, momentum=None)
    batches = [Case((n, 2)).make(seed=n).x for n in (4, 9)]
    for x in (batches[0], np.empty((0, 2), np.float32), batches[1]):
        bn(x)
    assert bn.num_batches_tracked == 2
    np.testing.assert_allclose(bn.running_mean, np.mean([x.mean(0) for x in batches], 0), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, np.mean([x.var(0, ddof=1) for x in batches], 0), rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repr_is_pytorch_s(torch, options):
    assert repr(fastbn.BatchNorm2d(3, **options)) == repr(torch.nn.BatchNorm2d(3, **options))


def test_repr_names_what_pytorch_has_not():
    assert repr(fastbn.BatchNorm2d(3, axis=-1, dtype=np.float64)).endswith("axis=-1, dtype=float64)")


@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))), ids=("deepcopy", "pickle")
)
def test_copies_are_equal_and_independent(duplicate):
    case = Case((6, 3, 5))
    bn = randomised(make(case, momentum=0.5)).eval()
    twin = duplicate(bn)
    np.testing.assert_array_equal(twin(case.make().x), bn(case.make().x))
    assert not twin.training
    assert twin.momentum == 0.5
    twin.params["weight"] += 1
    assert not np.array_equal(twin.weight, bn.weight)
    assert twin.weight is twin.params["weight"]
    bn(case.make().x)
    with pytest.raises(RuntimeError, match="forward"):  # the copy of a layer has not its input
        duplicate(bn).backward(case.make().dy)


@pytest.mark.parametrize("options", ({}, {"affine": False}, {"bias": False}), ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_fold_is_eval(case, options):
    bn = randomised(make(case, **options))
    folded = bn.fold()
    x = case.make().x
    np.testing.assert_array_equal(folded(x), bn.eval()(x))
    y = np.empty_like(x)
    assert folded(x, out=y) is y
    np.testing.assert_array_equal(y, bn(x))


def test_folded_layer_is_immutable():
    bn = fastbn.BatchNorm2d(3)
    folded = bn.fold()
    scale = folded.scale.copy()
    bn.running_var[:] = 9
    np.testing.assert_array_equal(folded.scale, scale)
    with pytest.raises(ValueError, match="read-only"):
        folded.scale[0] = 2
    for name in ("scale", "axis", "new"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(folded, name, scale)
        with pytest.raises(AttributeError, match="immutable"):
            delattr(folded, name)


def test_folded_layer_pickles():
    bn = randomised(fastbn.BatchNorm2d(3, axis=-1, dtype=np.float64))
    folded = bn.fold()
    twin = pickle.loads(pickle.dumps(folded))
    x = Case((2, 4, 4, 3), axis=-1).make().x
    np.testing.assert_array_equal(twin(x), folded(x))
    assert twin.scale.dtype == np.float64
    assert not twin.scale.flags.writeable


def test_fold_needs_running_statistics():
    with pytest.raises((ValueError, RuntimeError), match="running"):
        fastbn.BatchNorm2d(3, track_running_stats=False).fold()


@pytest.mark.parametrize("shape", ((4, 2), (16, 8, 40)))
def test_backward_uses_the_backend_of_its_forward(shape):
    """Signs of a forward with activation and residual are laid out as its backend wants them."""
    rng = np.random.default_rng(0)
    x, residual, dy = (rng.standard_normal(shape) for _ in range(3))
    bn = fastbn.BatchNorm1d(shape[1], activation="relu")
    bn(x, residual=residual)
    expected = bn.backward(dy)
    for other in fastbn.available_backends():
        bn(x, residual=residual)
        with fastbn.use_backend(other):
            for got, want in zip(bn.backward(dy), expected, strict=True):
                np.testing.assert_array_equal(got, want)


def test_an_activation_that_is_assigned_is_applied():
    bn = fastbn.BatchNorm1d(2).eval()
    x = -np.ones((3, 2), np.float32)
    bn.activation = "relu"
    np.testing.assert_array_equal(bn(x), 0)
    np.testing.assert_array_equal(bn.fold()(x), 0)
    with pytest.raises(ValueError, match="activation must be"):
        bn.activation = "sigmoid"
    assert bn.activation == "relu"
    np.testing.assert_array_equal(bn(x), 0)


@pytest.mark.parametrize("slope", (np.float32(0.5), np.int64(2)))
def test_a_slope_may_be_numpy_s(slope):
    bn = fastbn.BatchNorm1d(2, eps=0, activation=("leaky_relu", slope)).eval()
    np.testing.assert_array_equal(bn(-np.ones((3, 2), np.float32)), -slope)


def test_a_state_that_cannot_be_taken_over_changes_nothing():
    bn, other = fastbn.BatchNorm1d(2), fastbn.BatchNorm1d(2)
    other.weight[:] = 7
    bn.running_mean.flags.writeable = False
    with pytest.raises(ValueError, match=r"running_mean: the layer's array is read-only"):
        bn.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(bn.weight, 1)
    bn.running_mean = [3.0, 3.0]
    bn.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(bn.weight, 7)
    np.testing.assert_array_equal(bn.running_mean, 0)


def test_a_counter_of_one_element_loads(torch):
    """PyTorch's first versions wrote it so, and it reads it still."""
    state = fastbn.BatchNorm1d(2).state_dict() | {"num_batches_tracked": np.array([5])}
    bn, peer = fastbn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    bn.load_state_dict(state)
    peer.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    assert bn.num_batches_tracked == int(peer.num_batches_tracked) == 5


def test_a_layer_that_refers_to_itself_is_copied():
    bn = fastbn.BatchNorm1d(2)
    bn.me = bn
    duplicate = copy.deepcopy(bn)
    assert duplicate.me is duplicate is not bn


def test_classes_of_others_keep_their_words():
    class Mine(fastbn.BatchNorm1d):
        def __init_subclass__(cls, flag=False, **keywords):
            super().__init_subclass__(**keywords)
            cls.flag = flag

    class Other(Mine, flag=True):
        """Other words."""

    assert Mine.__doc__ is None
    assert Other.__doc__ == "Other words."
    assert Other.flag


def test_another_number_of_features_is_checked_against_the_arrays():
    bn, x = fastbn.BatchNorm2d(3), np.ones((4, 3, 2, 2), np.float32)
    bn(x)
    bn.num_features = 8
    with pytest.raises(ValueError, match=r"(weight|running_mean) should contain 8 elements not 3"):
        bn(np.ones((4, 8, 2, 2), np.float32))
    bn.num_features = 3
    bn(x)


@pytest.mark.parametrize("dtype", ("float16", "int64", "nonsense"))
def test_a_dtype_that_is_assigned_is_checked(dtype):
    bn = fastbn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        bn.dtype = dtype
    assert bn.dtype == np.float32


def test_running_statistics_that_share_memory_are_refused():
    bn, values = fastbn.BatchNorm1d(3), np.ones(6, np.float32)
    for bn.running_mean, bn.running_var in ((values[:3], values[2:5]), (values[:3], values[:3])):
        with pytest.raises(ValueError, match="share memory"):
            bn(np.zeros((4, 3), np.float32))
    assert (values == 1).all()
    bn.eval()(np.zeros((4, 3), np.float32))


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("counter, error", (("a", TypeError), (-1, ValueError), (1.5, TypeError)))
def test_a_counter_that_is_none_leaves_the_layer_alone(momentum, counter, error):
    bn = fastbn.BatchNorm1d(3, momentum=momentum)
    bn.num_batches_tracked = counter
    with pytest.raises(error, match="num_batches_tracked must"):
        bn(np.random.default_rng(0).standard_normal((4, 3)))
    assert (bn.running_mean == 0).all()
    bn.num_batches_tracked = np.int64(2)
    bn(np.ones((4, 3)))
    assert bn.num_batches_tracked == 3


def test_an_activation_is_kept_as_it_was():
    given = ["leaky_relu", 0.1]
    bn = fastbn.BatchNorm1d(3, activation=given)
    given[1] = 0.9
    x = np.full((2, 3), -1.0)
    assert_close(bn.eval()(x), bn.fold()(x))
    given[1] = 0.1
    deployed = fastbn.ScaleShift(np.ones(3), np.zeros(3), activation=given)
    given[1] = 0.9
    assert deployed.activation == ("leaky_relu", 0.1)
    assert_close(pickle.loads(pickle.dumps(deployed))(x), deployed(x))


@pytest.mark.parametrize(
    "name", ("BatchNorm2d", "GhostBatchNorm", "BatchRenorm", "RunningBatchNorm", "FrozenBatchNorm")
)
def test_no_positions_with_a_residual_and_an_activation(name):
    bn, x = getattr(fastbn, name)(3, activation="relu"), np.zeros((2, 3, 0, 4), np.float32)
    for _ in range(2):
        assert bn(x, residual=x).shape == x.shape
        bn.eval()


def test_out_may_be_a_matrix():
    x = np.random.default_rng(0).standard_normal((8, 3))
    out, dx = (np.zeros_like(x).view(np.matrix) for _ in range(2))
    bn, other = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3)
    assert bn(x, out=out) is out
    bn.backward(x, out=dx)
    np.testing.assert_array_equal(out, other(x))
    np.testing.assert_array_equal(dx, other.backward(x))


@pytest.mark.parametrize("when", ("before", "behind"))
@pytest.mark.parametrize("momentum", (0.25, None))
@pytest.mark.usefixtures("backend")
def test_an_interrupt_leaves_the_old_state_or_the_new_one(monkeypatch, momentum, when):
    """Python raises what came while a kernel ran when it is done."""
    x, backend = np.random.default_rng(0).standard_normal((5, 3), np.float32), kernels()
    forward = backend.forward

    def interrupted(*arguments):
        if when == "behind":
            forward(*arguments)
        raise KeyboardInterrupt

    bn, other = (fastbn.BatchNorm1d(3, momentum=momentum) for _ in range(2))
    bn(x), other(x)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bn(x + 1)
    if when == "behind":
        other(x + 1)
    for key, value in other.state_dict().items():
        np.testing.assert_array_equal(bn.state_dict()[key], value)
