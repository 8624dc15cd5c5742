/* The kernels of one instruction set, for float32 and float64. */

#define REAL float
#define REAL_BYTES 4
#define SUFFIX ps
#define INTEGER int32_t
#define NAME(f) JOIN(f, JOIN(float, ISA))
#include "kernels.h"
#undef REAL
#undef REAL_BYTES
#undef SUFFIX
#undef INTEGER
#undef NAME

#define REAL double
#define REAL_BYTES 8
#define SUFFIX pd
#define INTEGER int64_t
#define NAME(f) JOIN(f, JOIN(double, ISA))
#include "kernels.h"
#undef REAL
#undef REAL_BYTES
#undef SUFFIX
#undef INTEGER
#undef NAME
