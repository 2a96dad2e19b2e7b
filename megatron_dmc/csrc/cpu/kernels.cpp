// Compiled once for each instruction set, CPU_CAPABILITY; setup.py has the options.
#include "cpu/append.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/merge.h"
#include "cpu/near.h"
#include "cpu/norm.h"
#include "cpu/prefill.h"
#include "cpu/swiglu.h"

#define DMC_NAME_(capability) kernels_##capability
#define DMC_NAME(capability) DMC_NAME_(capability)

namespace dmc::cpu {

template <class T>
constexpr KernelsOf<T> kOf = {&append, &attend, &linear, &rms_norm, &prefill_write, &prefill_attention, &swiglu,
                              &swiglu_backward, &merge, &merge_backward, &near_join, &near_gradients};

const Kernels DMC_NAME(CPU_CAPABILITY) = {kOf<float>, kOf<bf16>};

}  // namespace dmc::cpu
