#if defined(__x86_64__)
#define SENSORIUM_AVX2
#include "isa.inc"
#endif
