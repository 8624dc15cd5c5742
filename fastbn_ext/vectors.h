/* Vectors of one value type and one instruction set: the twin of fastbn/backends/_numba/vectors.py.

   GCC's and Clang's vector extension is compiled for whatever the CPU has; only streaming stores and masks need intrinsics,
   and have plain C where there are none. A V fills one register, and its values as float64 a W of one or two: GCC 12 keeps
   vectors wider than a register on the stack, also between the rounds of a loop (32x64x112x112, training with AVX2: 5.4
   copies instead of 1.3). Operators do not work on a structure: W has `plus`, `minus`, `fused`. An M is one bit a lane where
   there are registers for MASKS, and all bits of a lane elsewhere.
*/

#define LANES (VECTOR_BYTES / (Index)sizeof(REAL))
#define OF(operation) JOIN(JOIN(REGISTER, operation), SUFFIX) /* _mm256_maskload_ps, say */

typedef REAL NAME(V) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER NAME(I) __attribute__((vector_size(VECTOR_BYTES)));
#if !MASKS
typedef NAME(I) NAME(M);
#elif VECTOR_BYTES > 8 * REAL_BYTES
typedef __mmask16 NAME(M);
#else
typedef __mmask8 NAME(M);
#endif
typedef double NAME(D) __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
#if REAL_BYTES == 4
typedef struct { NAME(D) low, high; } NAME(W);
#define WIDE(low, high) (W){low, high}
#else
typedef struct { NAME(D) low; } NAME(W);
#define WIDE(low, high) (W){low}
#endif
#define V NAME(V)
#define I NAME(I)
#define M NAME(M)
#define W NAME(W)
#define D NAME(D)

point V NAME(load)(const REAL *x) { return *(const V *)x; }
point void NAME(store)(REAL *x, V value) { *(V *)x = value; }
point V NAME(splat)(REAL value) { return value - (V){0}; }

point V NAME(fma)(V a, V b, V c) { return JOIN(FMA, REAL)(a, b, c); } /* a * b + c, as `fused` for W */

point W NAME(load_wide)(const double *x) { return WIDE(*(const D *)x, *(const D *)(x + VECTOR_BYTES / 8)); }
point void NAME(store_wide)(double *x, W value) { *(W *)x = value; }
point W NAME(splat_wide)(double value) { return WIDE(value - (D){0}, value - (D){0}); }
point W NAME(plus)(W a, W b) { return WIDE(a.low + b.low, a.high + b.high); }
point W NAME(minus)(W a, W b) { return WIDE(a.low - b.low, a.high - b.high); }
point W NAME(fused)(W a, W b, W c) { return WIDE(FMA_double(a.low, b.low, c.low), FMA_double(a.high, b.high, c.high)); }

point W NAME(widen)(V value) {
#if REAL_BYTES == 8
    return (W){value};
#elif VECTOR_BYTES == 64
    __m512 v = (__m512)value;
    return (W){(D)_mm512_cvtps_pd(_mm512_castps512_ps256(v)), (D)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#elif VECTOR_BYTES == 32
    __m256 v = (__m256)value;
    return (W){(D)_mm256_cvtps_pd(_mm256_castps256_ps128(v)), (D)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
    return (W){{value[0], value[1]}, {value[2], value[3]}};
#endif
}

/* widen(load(x)), which converts as it loads */
point W NAME(load_widened)(const REAL *x) {
#if REAL_BYTES == 4 && VECTOR_BYTES > 16
#define WIDENED(x) (D)JOIN(REGISTER, cvtps_pd)(JOIN(HALF, loadu_ps)(x))
    return (W){WIDENED(x), WIDENED(x + LANES / 2)};
#undef WIDENED
#else
    return NAME(widen)(NAME(load)(x));
#endif
}

/* W with 1 in every lane, of which the compiler does not know that a product with it is nothing to compute. */
point W NAME(ones)(void) {
    double one = 1;
    __asm__("" : "+m"(one));
    return NAME(splat_wide)(one);
}

/* sum + value * one, where products and sums are one operation */
point W NAME(added)(W sum, W value, W one) {
#if VECTOR_BYTES == 16
    return NAME(plus)(sum, value);
#else
    return NAME(fused)(value, one, sum);
#endif
}

/* As store, past the cache; x must lie on a line's boundary. Needs a fence at the end. */
point void NAME(stream)(REAL *x, V value) {
#if VECTOR_BYTES == 64
    _mm512_stream_si512((__m512i *)x, (__m512i)value);
#elif VECTOR_BYTES == 32
    _mm256_stream_si256((__m256i *)x, (__m256i)value);
#elif defined(__SSE2__)
    _mm_stream_si128((__m128i *)x, (__m128i)value);
#else
    NAME(store)(x, value);
#endif
}

point void NAME(put)(REAL *x, V value, int streaming) {
    if (streaming) NAME(stream)(x, value);
    else NAME(store)(x, value);
}

/* True in every lane that is not zero or below: NaN counts as positive. */
point M NAME(positive)(V value) {
#if MASKS
    return JOIN(OF(cmp), mask)(value, (V){0}, _CMP_NLE_UQ);
#else
    return ~(M)(value <= 0);
#endif
}

/* True in the first and in the last k lanes. */
point M NAME(foremost)(Index k) {
#if MASKS
    return (M)((1u << k) - 1);
#else
    M lane;
    for (int j = 0; j < LANES; j++) lane[j] = j;
    return lane < (INTEGER)k;
#endif
}
point M NAME(last)(Index k) { return ~NAME(foremost)(LANES - k); }

point V NAME(where)(M mask, V a, V b) {
#if MASKS
    return (V)OF(mask_blend)(mask, b, a);
#else
    return (V)(((M)a & mask) | ((M)b & ~mask));
#endif
}

point V NAME(finite)(V value) { return (V)((I)value & (I)(value - value == 0)); } /* zero where it is not */

/* As load, in the lanes where the mask is true, and zero in the others, which are not read. */
point V NAME(load_where)(const REAL *x, M mask) {
#if MASKS
    return (V)OF(maskz_loadu)(mask, x);
#elif VECTOR_BYTES == 32
    return (V)OF(maskload)(x, (__m256i)mask);
#else
    V value = {0};
    for (Index k = 0; k < LANES; k++)
        if (mask[k]) value[k] = x[k];
    return value;
#endif
}

/* As load_widened, and zero in the lanes where the mask is false, which may be read too. */
point W NAME(load_widened_where)(const REAL *x, M mask) {
#if MASKS && REAL_BYTES == 4
#define WIDENED(x, mask) (D)JOIN(REGISTER, maskz_cvtps_pd)(mask, JOIN(HALF, loadu_ps)(x))
    return (W){WIDENED(x, mask), WIDENED(x + LANES / 2, mask >> LANES / 2)};
#undef WIDENED
#else
    return NAME(widen)(NAME(where)(mask, NAME(load)(x), (V){0}));
#endif
}

/* As store, in the lanes where the mask is true: other bytes are not touched. */
point void NAME(store_where)(REAL *x, M mask, V value) {
#if MASKS
    OF(mask_storeu)(x, mask, value);
#elif VECTOR_BYTES == 32
    OF(maskstore)(x, (__m256i)mask, value);
#else
    for (Index k = 0; k < LANES; k++)
        if (mask[k]) x[k] = value[k];
#endif
}

/* value * slope, and zero for a slope of 0 even where `value` is infinite, without a branch */
point V NAME(scaled)(V value, REAL slope) { return (V)((I)(value * slope) & ((I){0} - (INTEGER)(slope != 0))); }

/* One bit a lane, and back. */
point uint16_t NAME(bits)(M mask) {
#if MASKS
    return mask;
#elif VECTOR_BYTES == 32
    return OF(movemask)((V)mask);
#else
    uint16_t word = 0;
    for (int k = 0; k < LANES; k++) word |= (mask[k] & 1) << k;
    return word;
#endif
}

point M NAME(mask_of)(uint16_t word) {
#if MASKS
    return (M)word;
#else
    M bit;
    for (int k = 0; k < LANES; k++) bit[k] = (INTEGER)1 << k;
    return (M)(((INTEGER)word & bit) == bit);
#endif
}

/* Sum of the lanes by halves: always in the same order. */
point double NAME(total)(W value) {
    double part[LANES];
    __builtin_memcpy(part, &value, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++) part[k] += part[k + width];
    return part[0];
}
