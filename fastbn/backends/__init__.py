"""The backends: one set of kernels, three times.

Every backend module has the same functions with the same signatures, over flat arrays in memory order that the caller
has checked. A tensor is seen as (N, C, S): channels first has S > 1, channels last is S = 1. Arguments are

    x, y, dy, dx, residual, dresidual   (N*C*S,) of one dtype, float32 or float64; residual and dresidual may be empty
    weight, bias, running_mean, ...     (C,) float32 or float64; weight and bias may be empty: 1 and 0
    stats                               (3, C) float64: mean, biased variance, invstd
    affine                              (3, C) float64: center, scale, shift; y = (x - center) * scale + shift
    slope                               of the activation below zero: 1 none, 0 ReLU, between leaky ReLU
    signs                               uint16 from `sign_words`, or empty: which outputs the activation let through

Arguments are inputs first, then sizes, then outputs. Nothing is checked, and nothing but the outputs is written. y may
be x or residual itself, dx may be dy or x itself; dresidual overlaps nothing. Behind an activation it needs signs.
"""
