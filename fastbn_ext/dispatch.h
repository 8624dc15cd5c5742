/* All kernels: for float32 and float64, for every instruction set that the compiler knows, chosen when they run. */

#ifndef FASTBN_DISPATCH_H
#define FASTBN_DISPATCH_H

#if !defined(__GNUC__)
#error "the kernels are written with the vector extension of GCC and Clang"
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#define fence() _mm_sfence()
#define relax() _mm_pause() /* while another thread is waited for */
#else
#define X86 0
#define fence() __atomic_thread_fence(__ATOMIC_RELEASE)
#define relax() ((void)0)
#endif

#include "channels.h"
#include "common.h"
#include "image_job.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

/* a * b + c, rounded once where the instruction set has that, by one of its functions. Left to the compiler, it would
   differ from place to place, and so would the last bit of a result at the end of a row. */
#define BY(function, V, a, b, c) (__typeof__(a))function((V)(a), (V)(b), (V)(c))

#define VECTOR_BYTES 16
#define MASKS 0
#define ISA baseline
#if defined(__aarch64__)
#define FMA_float(a, b, c) BY(vfmaq_f32, float32x4_t, c, a, b)
#define FMA_double(a, b, c) BY(vfmaq_f64, float64x2_t, c, a, b)
#else
#define FMA_float(a, b, c) ((a) * (b) + (c))
#define FMA_double FMA_float
#endif
#include "both_types.h"
#include "image_types.h"
#undef VECTOR_BYTES
#undef MASKS
#undef ISA
#undef FMA_float
#undef FMA_double

#if X86
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BEGIN_WITH(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END PRAGMA(clang attribute pop)
#else
#define BEGIN_WITH(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END PRAGMA(GCC pop_options)
#endif

#define VECTOR_BYTES 32
#define REGISTER _mm256
#define HALF _mm
#define FMA_float(a, b, c) BY(_mm256_fmadd_ps, __m256, a, b, c)
#define FMA_double(a, b, c) BY(_mm256_fmadd_pd, __m256d, a, b, c)
#define MASKS 0
#define ISA avx2
BEGIN_WITH("avx2,fma,f16c")
#include "both_types.h"
#include "image_types.h"
END
#undef MASKS
#undef ISA

#define MASKS 1
#define ISA avx512vl
BEGIN_WITH("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c")
#include "both_types.h"
END
#undef ISA
#undef FMA_float
#undef FMA_double
#undef HALF
#undef REGISTER
#undef VECTOR_BYTES

#define VECTOR_BYTES 64
#define REGISTER _mm512
#define HALF _mm256
#define FMA_float(a, b, c) BY(_mm512_fmadd_ps, __m512, a, b, c)
#define FMA_double(a, b, c) BY(_mm512_fmadd_pd, __m512d, a, b, c)
#define ISA avx512
BEGIN_WITH("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c")
#include "both_types.h"
#include "image_types.h"
END
#undef MASKS
#undef ISA
#undef FMA_float
#undef FMA_double
#undef HALF
#undef REGISTER
#undef VECTOR_BYTES
#undef BEGIN_WITH
#undef END
#undef PRAGMA
#endif

/* Instruction sets in order of preference; `kernels_of` takes an index into them. */
static const char *const instruction_sets[] = {
#if X86
    "avx512", "avx512vl", "avx2",
#endif
    "baseline",
};
enum { NUM_INSTRUCTION_SETS = sizeof instruction_sets / sizeof *instruction_sets };

/* Whether this CPU has the instruction set. Every one with AVX2 has F16C too, which Clang cannot ask for. */
static inline int has_instruction_set(int index) {
#if X86
    __builtin_cpu_init();
    if (index < 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    if (index == 2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return index < NUM_INSTRUCTION_SETS;
}

static inline int best_instruction_set(void) {
    int index = 0;
    while (!has_instruction_set(index)) index++;
    return index;
}

/* The one to begin with: the best; but Zen 4 computes 512 bits in two halves, and converts to float64 slower so than 256
   (6 values a cycle instead of 8; in cache, ns for 16 values on a thread with AVX-512, with AVX2, and with AVX-512's masks
   and 32 registers of 256 bits: 32x256x7x7, statistics 2.8, 2.45, 2.1, sums of gradients 3.7, 2.9, 2.6; 8x64x56x56, sums of
   gradients behind a ReLU 3.0, 3.5, 2.6). No other of its family has AVX-512; GCC 12 does not know its name. */
static inline int first_instruction_set(void) {
    const int best = best_instruction_set();
#if X86 && (defined(__clang__) || __GNUC__ > 10) /* older ones do not know the family */
    if (best == 0 && __builtin_cpu_is("amdfam19h")) return 1;
#endif
    return best;
}

static inline const Kernels *kernels_of(int index, int itemsize) {
    static const Kernels *const table[][2] = {
#if X86
        {&kernels_float_avx512, &kernels_double_avx512},
        {&kernels_float_avx512vl, &kernels_double_avx512vl},
        {&kernels_float_avx2, &kernels_double_avx2},
#endif
        {&kernels_float_baseline, &kernels_double_baseline},
    };
    return table[index][itemsize == 8];
}

/* Work on the statistics of image data, which are integers for the most part: Zen 4 takes up to a quarter less with AVX-512;
   `dtype` is an index into IMAGE_DTYPES of fastbn/backends/cython_.py. */
static inline ImageWork image_work_of(int index, int dtype) {
    static const ImageWork *const table[] = {
#if X86
        image_works_avx512, image_works_avx2, image_works_avx2,
#endif
        image_works_baseline,
    };
    return table[index][dtype];
}

#endif
