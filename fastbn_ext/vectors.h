/* Vectors of one value type and one instruction set: the twin of fastbn/backends/_vectors.py.

   GCC's and Clang's vector extension is compiled for whatever the CPU has; only streaming stores and the sign mask need
   intrinsics, and have plain C where there are none. A V fills one register, and its values as float64 a W of one or two:
   GCC 12 keeps vectors wider than a register on the stack, also between the rounds of a loop (32x64x112x112, training
   with AVX2: 5.4 copies instead of 1.3). Operators do not work on a structure: W has `plus`, `minus`, `fused`.
*/

#define LANES (VECTOR_BYTES / (Index)sizeof(REAL))

typedef REAL NAME(V) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER NAME(M) __attribute__((vector_size(VECTOR_BYTES)));
typedef double NAME(D) __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
#if REAL_BYTES == 4
typedef struct { NAME(D) low, high; } NAME(W);
#define WIDE(low, high) (W){low, high}
#else
typedef struct { NAME(D) low; } NAME(W);
#define WIDE(low, high) (W){low}
#endif
#define V NAME(V)
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
#if REAL_BYTES == 4 && VECTOR_BYTES == 64
    return (W){(D)_mm512_cvtps_pd(_mm256_loadu_ps(x)), (D)_mm512_cvtps_pd(_mm256_loadu_ps(x + 8))};
#elif REAL_BYTES == 4 && VECTOR_BYTES == 32
    return (W){(D)_mm256_cvtps_pd(_mm_loadu_ps(x)), (D)_mm256_cvtps_pd(_mm_loadu_ps(x + 4))};
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
point M NAME(positive)(V value) { return ~(M)(value <= 0); }
point V NAME(where)(M mask, V a, V b) { return (V)(((M)a & mask) | ((M)b & ~mask)); }
point V NAME(finite)(V value) { return (V)((M)value & (M)(value - value == 0)); } /* zero where it is not */

point M NAME(lanes)(void) {
    M lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane;
}

/* True in the first and in the last k lanes. */
point M NAME(foremost)(Index k) { return NAME(lanes)() < (INTEGER)k; }
point M NAME(last)(Index k) { return NAME(lanes)() >= (INTEGER)(LANES - k); }

/* As load, in the lanes where the mask is true, and zero in the others, which are not read. */
point V NAME(load_where)(const REAL *x, M mask) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return (V)_mm512_maskz_loadu_ps(_mm512_movepi32_mask((__m512i)mask), x);
#elif VECTOR_BYTES == 64
    return (V)_mm512_maskz_loadu_pd(_mm512_movepi64_mask((__m512i)mask), x);
#elif VECTOR_BYTES == 32 && REAL_BYTES == 4
    return (V)_mm256_maskload_ps(x, (__m256i)mask);
#elif VECTOR_BYTES == 32
    return (V)_mm256_maskload_pd(x, (__m256i)mask);
#else
    V value = {0};
    for (Index k = 0; k < LANES; k++)
        if (mask[k]) value[k] = x[k];
    return value;
#endif
}

/* As store, in the lanes where the mask is true: other bytes are not touched. */
point void NAME(store_where)(REAL *x, M mask, V value) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    _mm512_mask_storeu_ps(x, _mm512_movepi32_mask((__m512i)mask), (__m512)value);
#elif VECTOR_BYTES == 64
    _mm512_mask_storeu_pd(x, _mm512_movepi64_mask((__m512i)mask), (__m512d)value);
#elif VECTOR_BYTES == 32 && REAL_BYTES == 4
    _mm256_maskstore_ps(x, (__m256i)mask, (__m256)value);
#elif VECTOR_BYTES == 32
    _mm256_maskstore_pd(x, (__m256i)mask, (__m256d)value);
#else
    for (Index k = 0; k < LANES; k++)
        if (mask[k]) x[k] = value[k];
#endif
}

/* value * slope, and zero for a slope of 0 even where `value` is infinite, without a branch */
point V NAME(scaled)(V value, REAL slope) { return (V)((M)(value * slope) & ((M){0} - (INTEGER)(slope != 0))); }

/* One bit a lane, and back. */
point uint16_t NAME(bits)(M mask) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return _mm512_movepi32_mask((__m512i)mask);
#elif VECTOR_BYTES == 64
    return _mm512_movepi64_mask((__m512i)mask);
#elif VECTOR_BYTES == 32 && REAL_BYTES == 4
    return _mm256_movemask_ps((__m256)mask);
#elif VECTOR_BYTES == 32
    return _mm256_movemask_pd((__m256d)mask);
#else
    uint16_t word = 0;
    for (int k = 0; k < LANES; k++) word |= (mask[k] & 1) << k;
    return word;
#endif
}

point M NAME(mask_of)(uint16_t word) {
    M bit = (INTEGER)1 << NAME(lanes)();
    return (M)(((INTEGER)word & bit) == bit);
}

/* Sum of the lanes by halves: always in the same order. */
point double NAME(total)(W value) {
    double part[LANES];
    __builtin_memcpy(part, &value, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++) part[k] += part[k + width];
    return part[0];
}
