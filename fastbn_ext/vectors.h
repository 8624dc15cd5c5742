/* Vectors of one value type and one instruction set: the twin of fastbn/backends/_vectors.py.

   GCC's and Clang's vector extension is compiled for whatever the CPU has; only streaming stores and the sign mask need
   intrinsics, and have plain C where there are none. A V fills one register: GCC handles arithmetic on wider vectors
   well, comparisons not at all (AVX2, 64-byte vectors: 16 scalar comparisons). W has as many float64.
*/

#define LANES (VECTOR_BYTES / (Index)sizeof(REAL))

typedef REAL NAME(V) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER NAME(M) __attribute__((vector_size(VECTOR_BYTES)));
typedef double NAME(W) __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
typedef long long NAME(MW) __attribute__((vector_size(LANES * 8)));
#define V NAME(V)
#define M NAME(M)
#define W NAME(W)
#define MW NAME(MW)

point V NAME(load)(const REAL *x) { return *(const V *)x; }
point void NAME(store)(REAL *x, V value) { *(V *)x = value; }
point W NAME(load_wide)(const double *x) { return *(const W *)x; }
point void NAME(store_wide)(double *x, W value) { *(W *)x = value; }
point W NAME(widen)(V value) { return __builtin_convertvector(value, W); }
point V NAME(splat)(REAL value) { return value - (V){0}; }
point W NAME(splat_wide)(double value) { return value - (W){0}; }

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
point W NAME(finite)(W value) { return (W)((MW)value & (MW)(value - value == 0)); } /* zero where it is not */

point M NAME(lanes)(void) {
    M lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane;
}

/* True in the last k lanes. */
point M NAME(last)(Index k) { return NAME(lanes)() >= (INTEGER)(LANES - k); }
point MW NAME(wide_mask)(M mask) { return __builtin_convertvector(mask, MW); }

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
    return (M)(((INTEGER)word & bit) != 0);
}

/* Sum of the lanes by halves: always in the same order. */
point double NAME(total)(W value) {
    double part[LANES];
    __builtin_memcpy(part, &value, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++) part[k] += part[k + width];
    return part[0];
}
