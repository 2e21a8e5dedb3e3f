#define CDAS_ISA avx2
#define CDAS_VECTOR_BYTES 32
#include "isa.inc"
