#if defined(__x86_64__)
#define SENSORIUM_AVX512
#include "isa.inc"
#endif
