#define CDAS_ISA portable
#define CDAS_VECTOR_BYTES 16
#include "isa.inc"
