#if defined(__x86_64__)
#define SENSORIUM_AVX512_BF16
#include "isa.inc"
#endif
