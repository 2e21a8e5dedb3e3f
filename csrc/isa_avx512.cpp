#define CDAS_ISA avx512
#define CDAS_VECTOR_BYTES 64
#include "isa.inc"
