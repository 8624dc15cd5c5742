"""The backends: one set of kernels, three times.

Every backend module has the same functions with the same signatures, over dense arrays that the caller has checked. In
the order of memory a tensor is (N, C, S): channels first has S > 1, channels last is S = 1. Arguments are

    x, y, dy, dx, residual, dresidual   of one dtype and memory order; residual and dresidual may be None
    parameters                          weight, bias and running statistics, or what of them is there; see `_channels`
    norm                                (6, C) float64: mean, biased variance and invstd of the statistics; and center,
                                        scale and shift of y = (x - center) * scale + shift
    slope                               of the activation below zero: 1 none, 0 ReLU, between leaky ReLU
    signs                               uint16 from `sign_words`, or None: which outputs the activation let through
    mean, rest, m2                      (C,) float64: mean, what rounding took from it, sum of squared deviations
    sums                                (2, C) float64: of dy and of dy * (x - mean), behind the activation
    grads                               (4, C) float64: what `finish_gradient` in `_channels` makes of the sums
    factor                              weight of the batch in the running statistics, or None: they stay
    eps                                 added to the variance

Arguments are inputs first, then sizes, then outputs. Nothing is checked, and nothing is written but the outputs and, in
`forward`, the running statistics. y may be x or residual itself, dx may be dy or x itself; dresidual overlaps nothing.
Behind an activation it needs signs.
"""
