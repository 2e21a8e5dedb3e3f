// What the library exports: the kernels of the instruction set in use, and which those are.

#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "parallel.h"

#ifdef CDAS_X86
namespace avx512_bf16 {
extern const CdasKernels kernels;
}
namespace avx512 {
extern const CdasKernels kernels;
}
namespace avx2 {
extern const CdasKernels kernels;
}
#endif
namespace portable {
extern const CdasKernels kernels;
}

namespace cdas {
OpenMP openmp;
}

namespace {

struct InstructionSet {
  const char* name;
  const CdasKernels* kernels;
  bool supported;
};

#ifdef CDAS_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }  // F16C is older than AVX2
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

// The best first.
const InstructionSet* instruction_sets() {
  static const InstructionSet all[] = {
#ifdef CDAS_X86
      {"avx512_bf16", &avx512_bf16::kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {"avx512", &avx512::kernels, has_avx512()},
      {"avx2", &avx2::kernels, has_avx2()},
#endif
      {"portable", &portable::kernels, true},
      {nullptr, nullptr, false},
  };
  return all;
}

const InstructionSet* in_use = nullptr;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Takes the kernels of the named instruction set, of the best one for null. False if the machine lacks it or no such exists.
bool cdas_use_instruction_set(const char* name) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->supported && (!name || !std::strcmp(name, set->name))) {
      in_use = set;
      return true;
    }
  return false;
}
const char* cdas_instruction_set() { return in_use ? in_use->name : nullptr; }

// Of index 0, 1, ...: the names of what this build has and this machine can run; null after the last.
const char* cdas_supported_instruction_set(int index) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->supported && index-- == 0) return set->name;
  return nullptr;
}

// Takes GOMP_parallel, or null for one thread.
void cdas_use_openmp(void* parallel) { cdas::openmp.parallel = reinterpret_cast<decltype(cdas::openmp.parallel)>(parallel); }

// Asks for pages of 2 MiB under memory that is about to be written: the first touch of 16 MiB costs 8 faults, not 4096.
void cdas_use_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t huge = 2 << 20, page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end >= begin + 2 * huge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int64_t cdas_head_loss_rows(int32_t dtype) { return in_use->kernels->head_loss_rows(dtype); }
int64_t cdas_head_loss_workspace(const CdasHeadLoss* args) { return in_use->kernels->head_loss_workspace(args); }
void cdas_head_loss(const CdasHeadLoss* args) { in_use->kernels->head_loss(args); }
int64_t cdas_clamp_workspace(const CdasClamp* args) { return in_use->kernels->clamp_workspace(args); }
void cdas_clamp_forward(const CdasClamp* args) { in_use->kernels->clamp_forward(args); }
void cdas_clamp_backward(const CdasClamp* args) { in_use->kernels->clamp_backward(args); }
int64_t cdas_packed_attention_workspace(const CdasPackedAttention* args) {
  return in_use->kernels->packed_attention_workspace(args);
}
void cdas_packed_attention_forward(const CdasPackedAttention* args) { in_use->kernels->packed_attention_forward(args); }
void cdas_packed_attention_backward(const CdasPackedAttention* args) { in_use->kernels->packed_attention_backward(args); }
void cdas_rms_norm_forward(const CdasRmsNorm* args) { in_use->kernels->rms_norm_forward(args); }
void cdas_rms_norm_backward(const CdasRmsNorm* args) { in_use->kernels->rms_norm_backward(args); }
void cdas_gated_activation_forward(const CdasGatedActivation* args) { in_use->kernels->gated_activation_forward(args); }
void cdas_gated_activation_backward(const CdasGatedActivation* args) { in_use->kernels->gated_activation_backward(args); }
void cdas_rotary(const CdasRotary* args) { in_use->kernels->rotary(args); }
void cdas_dequantize_nf4(const CdasNf4* args) { in_use->kernels->dequantize_nf4(args); }

}  // extern "C"
#pragma GCC visibility pop
