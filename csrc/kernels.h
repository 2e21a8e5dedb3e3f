// The C interface of the CPU kernels: plain structures and functions, one table of functions for each instruction set.
//
// Nothing here needs the headers of Python or of PyTorch, so building takes a C++17 compiler and nothing else, and one
// library serves every version of both. cdas_fast/ops/cpu_library.py mirrors the structures.
#pragma once

#include <cstdint>

// Dtypes of tensors. The maths is float64 where hidden is float64, float32 elsewhere.
enum CdasDtype : int32_t { CDAS_FLOAT32 = 0, CDAS_FLOAT64 = 1, CDAS_BFLOAT16 = 2, CDAS_FLOAT16 = 3 };

enum CdasDivergence : int32_t { CDAS_JSD = 0, CDAS_FORWARD_KL = 1, CDAS_REVERSE_KL = 2, CDAS_LOGPROB = 3 };

enum CdasActivation : int32_t { CDAS_SILU = 0, CDAS_GELU_TANH = 1 };

struct CdasMatrix {
  const void* data;
  int64_t row_stride, column_stride;  // in elements
  int32_t dtype;
};

// One chunk of rows of a head loss. z = softcap(scale (W h + b)) / temperature; see linear_head.h.
struct CdasHeadLoss {
  int64_t rows, vocabulary, width, target_width;
  CdasMatrix hidden;         // {rows, width}
  CdasMatrix target_hidden;  // {rows, target_width}, not for CDAS_LOGPROB
  CdasMatrix weight;         // {vocabulary, width}
  CdasMatrix target_weight;  // {vocabulary, target_width}; the data of `weight` if the head is shared
  const void* bias;          // {vocabulary} in the dtype of the maths, or null
  const void* target_bias;
  const int64_t* labels;  // {rows}, -1 where ignored; CDAS_LOGPROB only
  void* loss;             // {rows} in the dtype of the maths
  void* gradient;         // {rows, width}, contiguous, or null
  void* workspace;        // as many bytes as workspace() says, aligned to 64
  double softcap;         // 0 for none
  double scale, temperature, beta;
  int32_t gradient_dtype, divergence, threads;
};

// The intervention on a subspace, see interchange.h. The rows of a sequence are `rows_per_sequence` neighbours; they share a
// value and a direction. hidden, grad_out, out and grad_hidden have one dtype, the others that of the maths; all are contiguous
// but for the row strides of the first two.
struct CdasClamp {
  int64_t rows, width, rank, concepts, rows_per_sequence;
  const void* hidden;         // {rows, width}
  const void* grad_out;       // {rows, width}, backward only
  int64_t hidden_stride, grad_out_stride;
  const void* direction;      // {concepts, rank, width}
  const void* value;          // {sequences, rank}
  const int64_t* concept_of;  // {sequences}, or null for one direction
  const uint8_t* mask;        // {rows}, 0 where nothing is done, or null
  void* out;                  // {rows, width}, forward only
  void* grad_hidden;          // {rows, width}, or null
  void* grad_value;           // {sequences, rank}, or null
  void* grad_direction;       // {concepts, rank, width}, or null
  void* workspace;            // as many bytes as clamp_workspace() says, aligned to 64; backward only
  int32_t dtype, threads;
};

// Tokens by heads by columns, the columns next to each other.
struct CdasHeads {
  const void* data;
  int64_t token_stride, head_stride;  // in elements
};

// Causal attention over packed rows that share a prefix, see packed_attention.h. Row b has the tokens starts[b] to
// starts[b + 1] - 1. All tensors have one dtype but log_sum, which has that of the maths; what is written is contiguous.
struct CdasPackedAttention {
  int64_t rows, heads, groups, width, value_width, prefix;
  int64_t window;         // keys that a query sees at most, itself included; 0 for all
  const int64_t* starts;  // {rows + 1}
  CdasHeads query;        // {tokens, heads, width}
  CdasHeads key;          // {tokens, groups, width}; heads / groups neighbouring heads of queries share one
  CdasHeads value;        // {tokens, groups, value_width}
  CdasHeads prefix_key;   // {prefix, groups, width}
  CdasHeads prefix_value;
  CdasHeads grad_out;  // {tokens, heads, value_width}; backward only, data null in forward
  void* out;           // {tokens, heads, value_width}; forward only
  void* log_sum;       // {tokens, heads}: log of the sum of the exponentials of the scores; written by forward, read by backward
  void* grad_query;    // {tokens, heads, width}; these three backward only
  void* grad_key;      // {tokens, groups, width}
  void* grad_value;    // {tokens, groups, value_width}
  void* workspace;     // as many bytes as packed_attention_workspace() says, aligned to 64
  double scale, softcap;  // softcap 0 for none
  int32_t dtype, threads;
};

// Rows, each contiguous, at two strides: row r lies at (r / inner) outer_stride + (r % inner) inner_stride.
struct CdasRows {
  const void* data;
  int64_t inner, inner_stride, outer_stride;  // the strides in elements; inner > 0
};

// RMS norm of rows, see elementwise.h. Activations have the dtype named, the factor that of the maths.
struct CdasRmsNorm {
  int64_t rows, width;
  CdasRows x;          // {rows, width}
  CdasRows grad_out;   // {rows, width}, backward only
  const void* factor;  // {width}
  void* out;           // {rows, width}, contiguous: y, or the gradient of x
  double eps;
  int32_t round_normalized;  // whether n is rounded to the dtype of x before the product, forward only
  int32_t dtype, threads;
};

// The activation of a gate times what it gates, see elementwise.h. All have one dtype.
struct CdasGatedActivation {
  int64_t rows, width;
  CdasRows gate, up;  // {rows, width}
  CdasRows grad_out;  // {rows, width}, backward only
  void* out;          // {rows, width}, contiguous, forward only
  void* grad_gate;    // {rows, width}, contiguous, or null
  void* grad_up;      // {rows, width}, contiguous, or null
  int32_t activation, dtype, threads;
};

// Rotary position embedding, see elementwise.h. All have one dtype.
struct CdasRotary {
  int64_t rows, heads, width;  // tokens by heads by columns, the latter even
  CdasRows x;                  // {rows, width}, of the first head
  int64_t head_stride;
  CdasRows cos, sin;  // {rows, width}
  void* out;          // {rows, heads, width}, contiguous
  int32_t dtype, threads;
};

// Weights in 4 bits, see nf4.h.
struct CdasNf4 {
  int64_t count;               // of values; blocks of 64, the last one may be shorter
  const uint8_t* packed;       // {(count + 1) / 2}
  const void* absmax;          // {blocks}: uint8_t, or float if nested_code is null
  const float* nested_absmax;  // {(blocks + 255) / 256}
  const float* nested_code;    // {256}, or null
  const float* offset;         // {1}
  void* out;                   // {count}
  int32_t dtype, threads;      // not CDAS_FLOAT64
};

struct CdasKernels {
  int64_t (*head_loss_rows)(int32_t dtype);  // rows that are done as one; fewer are best a multiple of a quarter of them
  int64_t (*head_loss_workspace)(const CdasHeadLoss*);
  void (*head_loss)(const CdasHeadLoss*);
  int64_t (*clamp_workspace)(const CdasClamp*);
  void (*clamp_forward)(const CdasClamp*);
  void (*clamp_backward)(const CdasClamp*);
  int64_t (*packed_attention_workspace)(const CdasPackedAttention*);
  void (*packed_attention_forward)(const CdasPackedAttention*);
  void (*packed_attention_backward)(const CdasPackedAttention*);
  void (*rms_norm_forward)(const CdasRmsNorm*);
  void (*rms_norm_backward)(const CdasRmsNorm*);
  void (*gated_activation_forward)(const CdasGatedActivation*);
  void (*gated_activation_backward)(const CdasGatedActivation*);
  void (*rotary)(const CdasRotary*);
  void (*dequantize_nf4)(const CdasNf4*);
};
