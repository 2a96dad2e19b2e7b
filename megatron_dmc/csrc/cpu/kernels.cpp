// Compiled once for each instruction set, CPU_CAPABILITY; setup.py has the options.
#include "cpu/append.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/prefill.h"
#include "cpu/swiglu.h"

#define DMC_NAME_(capability) kernels_##capability
#define DMC_NAME(capability) DMC_NAME_(capability)

namespace dmc::cpu {

const Kernels DMC_NAME(CPU_CAPABILITY) = {
    {&append, &attend, &linear, &rms_norm, &prefill_write, &prefill_attention, &swiglu},
    {&append, &attend, &linear, &rms_norm, &prefill_write, &prefill_attention, &swiglu}};

}  // namespace dmc::cpu
