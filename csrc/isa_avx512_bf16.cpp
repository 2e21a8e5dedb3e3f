#define CDAS_ISA avx512_bf16
#define CDAS_VECTOR_BYTES 64
#include "isa.inc"
