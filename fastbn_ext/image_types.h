/* Statistics of image data of one instruction set, for all value types: see images.h. */

#define NAME(f) JOIN(image_##f, JOIN(STORED, ISA))

#define STORED uint8_t
#define WIDE uint16_t
#define PAIR uint32_t
#include "images.h"
#undef STORED
#undef WIDE
#define STORED int8_t
#define WIDE int16_t
#include "images.h"
#undef STORED
#undef WIDE
#undef PAIR
#define STORED uint16_t
#define WIDE uint32_t
#define PAIR uint64_t
#include "images.h"
#undef STORED
#undef WIDE
#define STORED int16_t
#define WIDE int32_t
#include "images.h"
#undef STORED
#undef WIDE
#undef PAIR

#define VALUE(x) ((double)(x))
#define STORED double
#define LOAD(x) (*(const NAME(Wide) *)(x))
#include "images.h"
#undef STORED
#undef LOAD
#define STORED float
typedef float JOIN(FourFloats, ISA) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));
#define LOAD(x) __builtin_convertvector(*(const JOIN(FourFloats, ISA) *)(x), NAME(Wide))
#include "images.h"
#undef STORED
#undef LOAD
#undef VALUE

#define VALUE(x) half_value(x)
#define STORED Half
#if VECTOR_BYTES == 64
#define LOAD(x) ((NAME(Wide))_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x)))))
#elif VECTOR_BYTES == 32
#define LOAD(x) ((NAME(Wide))_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(x)))))
#else
#define LOAD(x) ((NAME(Wide)){half_value((x)[0]), half_value((x)[1])})
#endif
#include "images.h"
#undef STORED
#undef LOAD
#undef VALUE
#undef NAME

/* In the order of IMAGE_DTYPES in fastbn/backends/cython_.py. */
static const ImageWork JOIN(image_works, ISA)[] = {
#define WORK(type) JOIN(image_work, JOIN(type, ISA))
    WORK(uint8_t), WORK(int8_t), WORK(uint16_t), WORK(int16_t), WORK(Half), WORK(float), WORK(double),
#undef WORK
};
