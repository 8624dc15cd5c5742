/* Points: activation, output and gradient of one vector; the twin of fastbn/backends/_numba/points.py.
   kernels.h includes this file for each value type and instruction set. */

/* z where the activation is open, slope * z elsewhere; a slope of 0 gives zero even for an infinite z. */
point V NAME(activated)(V z, M open, REAL slope) { return NAME(where)(open, z, NAME(scaled)(z, slope)); }

/* activation((x - center) * scale + shift + residual) */
point V NAME(output)(V x, V added, V high, V scale, V low, REAL slope, uint16_t *sign) {
    V z = NAME(fma)(x - high, scale, low) + added;
    if (slope != 1) {
        M open = NAME(positive)(z);
        if (sign) *sign = NAME(bits)(open);
        z = NAME(activated)(z, open, slope);
    }
    return z;
}

/* Signs of the vector from value i on in a row whose words are these. */
point M NAME(mask_at)(const uint16_t *sign, Index i) {
    const size_t word = (size_t)i / LANES, bit = (size_t)i % LANES;
    return NAME(mask_of)((sign[word] | (uint32_t)sign[word + 1] << LANES) >> bit);
}

/* Signs without a residual, computed again exactly as in `output`. */
point M NAME(signs_of)(V x, V high, V scale, V low) { return NAME(positive)(NAME(fma)(x - high, scale, low)); }

/* dy behind the activation, whose sign is read or computed again. */
point V NAME(gated)(V dy, V x, V high, V scale, V low, REAL slope, const uint16_t *sign) {
    if (slope == 1) return dy;
    return NAME(activated)(dy, sign ? NAME(mask_of)(*sign) : NAME(signs_of)(x, high, scale, low), slope);
}

/* Where the activation of the vector at x is open, from sign i of its row or computed again. */
point M NAME(open_at)(const REAL *x, V high, V scale, V low, const uint16_t *sign, Index i) {
    return sign ? NAME(mask_at)(sign, i) : NAME(signs_of)(NAME(load)(x), high, scale, low);
}

/* `gated` as W, from x and dy in memory. A ReLU chooses what becomes float64 as it is loaded (design, J). */
point W NAME(wide_gated)(const REAL *x, const REAL *dy, V high, V scale, V low, REAL slope, const uint16_t *sign, Index i,
                         const int kind) {
    if (kind == PLAIN) return NAME(load_widened)(dy);
    const M open = NAME(open_at)(x, high, scale, low, sign, i);
    if (kind == RELU || kind == SIGNED) return NAME(load_widened_where)(dy, open);
    return NAME(widen)(NAME(activated)(NAME(load)(dy), open, slope));
}

/* dx of a gated dy */
point V NAME(gradient)(V dy, V x, int training, V scale, V mean, V a, V b) {
    return training ? NAME(fma)(scale, dy, NAME(fma)(a, x - mean, b)) : (V)(scale * dy);
}
