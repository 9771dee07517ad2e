#include "isa.inc"
