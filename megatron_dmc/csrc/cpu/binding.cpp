// The operators `torch.ops.megatron_dmc_cpu.*`, and the choice of the instruction set. The wrappers in
// megatron_dmc/ops/cpu allocate all outputs.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "append_operator.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/recording.h"

namespace {

using dmc::cpu::Recording;

// This machine's best instruction set among those that were built; empty if it has none of them.
// ATEN_CPU_CAPABILITY, which limits torch's own choice, is not asked.
struct Choice {
  const char* name = "";
  const dmc::cpu::Kernels* kernels = nullptr;

  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      *this = {"avx2", &dmc::cpu::kernels_AVX2};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      *this = {"avx512", &dmc::cpu::kernels_AVX512};
      if (__builtin_cpu_supports("avx512bf16"))
        *this = {"avx512_bf16", &dmc::cpu::kernels_AVX512_BF16};
    }
#else
    *this = {"default", &dmc::cpu::kernels_DEFAULT};
#endif
  }
  Choice(const char* name, const dmc::cpu::Kernels* kernels) : name(name), kernels(kernels) {}
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

std::string instruction_set() { return choice().name; }

const dmc::cpu::Kernels& kernels() {
  TORCH_CHECK(choice().kernels, "the CPU kernels are built for AVX2 and later; this machine has none of it");
  return *choice().kernels;
}

template <class T>
const dmc::cpu::KernelsOf<T>& kernels_of() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().of_float;
  } else {
    return kernels().of_bf16;
  }
}

void check_kernel_dtype(ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "dtype ", dtype,
                    "; the kernels take bfloat16 and float32");
}

void check_supported(ScalarType dtype, int64_t head_dim, int64_t page_size) {
  check_kernel_dtype(dtype);
  TORCH_CHECK_VALUE(head_dim % dmc::cpu::kDimStep == 0 && head_dim <= dmc::cpu::kMaxDim,
                    "head_dim=", head_dim, "; the kernels take multiples of ",
                    dmc::cpu::kDimStep, " up to ", dmc::cpu::kMaxDim);
  TORCH_CHECK_VALUE(page_size >= 8 && (page_size & (page_size - 1)) == 0, "page_size=", page_size,
                    "; the kernels take powers of two from 8 on");
}

void check_device(const Tensor& x, const char* name, const Tensor&) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " is on ", x.device(), "; expected the CPU");
}

template <class Launch>
void launch_for(const Tensor& like, Launch launch) {
  if (like.scalar_type() == ScalarType::BFloat16) {
    launch(dmc::bf16{});
  } else {
    launch(0.0f);
  }
}

template <class T>
void launch(const dmc::AppendParams<T>& p) {
  Recording::perform([p] { kernels_of<T>().append(p); });
}

void paged_decode_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                            const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                            const Tensor& table, const Tensor& entries, const Tensor& rows,
                            const Tensor& out, double softmax_scale) {
  check_shape(q, "q", {kAny, kAny, kAny});
  check_shape(table, "block_table", {kAny, kAny, kAny});
  const int64_t batch = q.size(0), dim = q.size(2), heads = table.size(1);
  const ScalarType dtype = q.scalar_type();
  check_cache(k_pages, v_pages, k_scales, v_scales, table, entries, dtype, heads, dim);
  const int64_t group = checked_group(q, heads);
  TORCH_CHECK_VALUE(group <= dmc::cpu::kMaxGroup, group, " query heads for each key/value head; the kernels "
                    "take ", dmc::cpu::kMaxGroup);
  check_last_dense(q, "q");
  check_indices(rows, "rows", batch);
  check_shape(out, "out", {batch, q.size(1), dim});
  check_dtype(out, "out", dtype);
  check_last_dense(out, "out");
  check_devices({{"q", q}, {"k_pages", k_pages}, {"v_pages", v_pages}, {"block_table", table},
                 {"num_entries", entries}, {"rows", rows}, {"out", out}});
  launch_for(q, [&](auto type) {
    using T = decltype(type);
    dmc::cpu::AttentionParams<T> p{};
    p.kv = paged(k_pages, v_pages, k_scales, v_scales, table, entries);
    p.q_BND = data<T>(q);
    p.out_BND = data<T>(out);
    p.rows_B = data<int64_t>(rows);
    copy_strides(p.q_stride, q);
    copy_strides(p.out_stride, out);
    p.num_requests = int(batch);
    p.num_kv_heads = int(heads);
    p.group = int(group);
    p.scale = float(softmax_scale);
    Recording::perform([p] { kernels_of<T>().attend(p); });
  });
}

}  // namespace

#include "cpu/merge_operators.h"
#include "cpu/near_operators.h"
#include "cpu/prefill_operators.h"

namespace {

// PyTorch's.
void matmul(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, const Tensor& out) {
  Recording::perform([=] {
    Tensor to = out;
    if (residual) {
      at::addmm_out(to, *residual, x, weight.t());
    } else {
      at::mm_out(to, x, weight.t());
    }
  });
}

void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, const Tensor& out) {
  check_shape(weight, "weight", {kAny, kAny});
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const ScalarType dtype = weight.scalar_type();
  check_shape(x, "x", {kAny, inputs});
  check_shape(out, "out", {x.size(0), outputs});
  check_kernel_dtype(dtype);
  check_dtype(x, "x", dtype);
  check_dtype(out, "out", dtype);
  check_last_dense(x, "x");
  TORCH_CHECK_VALUE(weight.is_contiguous() && out.is_contiguous(), "weight and out must be contiguous");
  TORCH_CHECK_VALUE(inputs % dmc::cpu::kDimStep == 0 && outputs % 4 == 0, "weight is ", outputs, " x ", inputs,
                    "; the kernel takes multiples of 4 outputs and ", dmc::cpu::kDimStep, " inputs");
  check_devices({{"x", x}, {"weight", weight}, {"out", out}});
  if (residual) {
    check_shape(*residual, "residual", {x.size(0), outputs});
    check_dtype(*residual, "residual", dtype);
    check_devices({{"residual", *residual}, {"out", out}});
    TORCH_CHECK_VALUE(residual->is_contiguous(), "residual must be contiguous");
  }
  launch_for(x, [&](auto type) {
    using T = decltype(type);
    const dmc::cpu::LinearParams<T> p{data<T>(x), data<T>(weight), data<T>(residual), data<T>(out),
                                      x.size(0),  inputs,          outputs,           x.stride(0)};
    Recording::perform([p] { kernels_of<T>().linear(p); });
  });
}

// `x` is (M, 2 C); of the others `name` and whether their rows are of C.
int64_t checked_channels(const Tensor& x, std::initializer_list<std::pair<Argument, bool>> others) {
  check_shape(x, "x", {kAny, kAny});
  check_kernel_dtype(x.scalar_type());
  check_dense(x, "x");
  const int64_t channels = x.size(1) / 2;
  TORCH_CHECK_VALUE(x.size(1) == 2 * channels && channels % dmc::cpu::kDimStep == 0, "x has rows of ", x.size(1),
                    "; the kernel takes twice a multiple of ", dmc::cpu::kDimStep);
  for (const auto& [argument, is_half] : others) {
    const Tensor& other = *argument.tensor;
    check_shape(other, argument.name, {x.size(0), is_half ? channels : 2 * channels});
    check_dtype(other, argument.name, x.scalar_type());
    check_dense(other, argument.name);
    check_devices({{"x", x}, argument});
  }
  return channels;
}

void swiglu(const Tensor& x, const Tensor& out) {
  const int64_t channels = checked_channels(x, {{{"out", out}, true}});
  launch_for(x, [&](auto type) {
    using T = decltype(type);
    const dmc::cpu::SwigluParams<T> p{data<T>(x), data<T>(out), x.size(0), channels};
    Recording::perform([p] { kernels_of<T>().swiglu(p); });
  });
}

void swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& out) {
  const int64_t channels = checked_channels(x, {{{"grad", grad}, true}, {{"out", out}, false}});
  launch_for(x, [&](auto type) {
    using T = decltype(type);
    kernels_of<T>().swiglu_backward({data<T>(x), data<T>(grad), data<T>(out), x.size(0), channels});
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, double eps) {
  const ScalarType dtype = x.scalar_type();
  check_shape(x, "x", {kAny, kAny});
  check_shape(weight, "weight", {x.size(1)});
  check_shape(out, "out", {x.size(0), x.size(1)});
  check_kernel_dtype(dtype);
  check_dtype(weight, "weight", dtype);
  check_dtype(out, "out", dtype);
  check_last_dense(x, "x");
  TORCH_CHECK_VALUE(weight.is_contiguous() && out.is_contiguous(), "weight and out must be contiguous");
  check_devices({{"x", x}, {"weight", weight}, {"out", out}});
  launch_for(x, [&](auto type) {
    using T = decltype(type);
    const dmc::cpu::NormParams<T> p{data<T>(x), data<T>(weight), data<T>(out), x.size(0),
                                    x.size(1),  x.stride(0),     float(eps)};
    Recording::perform([p] { kernels_of<T>().rms_norm(p); });
  });
}

// Recorded like the others, unlike PyTorch's own.
void copy(const Tensor& x, const Tensor& out) {
  check_dtype(out, "out", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == out.sizes(), "x is ", x.sizes(), ", out ", out.sizes());
  check_devices({{"x", x}, {"out", out}});
  Recording::perform([x, out] { out.copy_(x); });
}

void release_pages(const Tensor& ids, const Tensor& free_ids, const Tensor& free_state,
                   const Tensor& extra_owners) {
  check_shape(ids, "page_ids", {kAny, kAny});
  check_dtype(ids, "page_ids", ScalarType::Int);
  check_last_dense(ids, "page_ids");
  check_ints(free_ids, "free_page_ids", {kAny});
  check_ints(free_state, "free_state", {2});
  check_ints(extra_owners, "num_extra_owners", {free_ids.size(0)});
  check_devices({{"page_ids", ids}, {"free_page_ids", free_ids}, {"free_state", free_state},
                 {"num_extra_owners", extra_owners}});
  int32_t* stack = data<int32_t>(free_ids);
  int32_t& taken = *data<int32_t>(free_state);
  int32_t* owners = data<int32_t>(extra_owners);
  for (int64_t x = 0; x < ids.size(0); ++x) {
    int32_t* row = data<int32_t>(ids) + x * ids.stride(0);
    for (int64_t y = 0; y < ids.size(1); ++y) {
      const int32_t page = row[y];
      if (page < 0) continue;
      row[y] = dmc::kNoPage;
      if (owners[page] > 0) {
        --owners[page];
      } else {
        stack[--taken] = page;
      }
    }
  }
}

// Advice, which the system may ignore: also about what else lies in the first and the last huge page.
void advise_huge_pages(const Tensor& x, bool at_once) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 1 << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1 and later
  const uintptr_t first = reinterpret_cast<uintptr_t>(x.data_ptr()) / kHuge * kHuge;
  const size_t size = reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes() - first;
  const size_t bytes = (size + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), bytes, MADV_HUGEPAGE);
  if (at_once) madvise(reinterpret_cast<void*>(first), bytes, kCollapse);
#endif
}

// Of what the operators are and take; `REVISION` of ops/cpu/__init__.py is the one that the package needs.
int64_t revision() { return 5; }

}  // namespace

TORCH_LIBRARY(megatron_dmc_cpu, m) {
  m.def(kAppendSchema);
  m.def(
      "paged_decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, "
      "Tensor? v_scales, Tensor block_table, Tensor num_entries, Tensor rows, Tensor(a!) out, "
      "float softmax_scale) -> ()");
  m.def(
      "release_pages(Tensor(a!) page_ids, Tensor(b!) free_page_ids, Tensor(c!) free_state, "
      "Tensor(d!) num_extra_owners) -> ()");
  m.def(kPrefillWriteSchema);
  m.def(kPrefillAttentionSchema);
  m.def(kMergeSchema);
  m.def(kMergeBackwardSchema);
  m.def(kNearJoinSchema);
  m.def(kNearGradientsSchema);
  m.def("swiglu(Tensor x, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor x, Tensor grad, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor(a!) out, float eps) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("matmul(Tensor x, Tensor weight, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("copy(Tensor x, Tensor(a!) out) -> ()");
  m.def("advise_huge_pages(Tensor x, bool at_once) -> ()");
  m.def("instruction_set() -> str");
  m.def("revision() -> int");
  m.class_<Recording>("Recording")
      .def(torch::init<>())
      .def("begin", &Recording::begin)
      .def("end", &Recording::end)
      .def("replay", &Recording::replay)
      .def("foreign", &Recording::foreign)
      .def("is_like", &Recording::is_like)
      .def("settle", &Recording::settle);
}

TORCH_LIBRARY_IMPL(megatron_dmc_cpu, CompositeExplicitAutograd, m) {
  m.impl("decode_append", &decode_append);
  m.impl("paged_decode_attention", &paged_decode_attention);
  m.impl("prefill_write", &prefill_write);
  m.impl("prefill_attention", &prefill_attention);
  m.impl("merge", &merge);
  m.impl("merge_backward", &merge_backward);
  m.impl("near_join", &near_join);
  m.impl("near_gradients", &near_gradients);
  m.impl("linear", &linear);
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("rms_norm", &rms_norm);
  m.impl("release_pages", &release_pages);
  m.impl("matmul", &matmul);
  m.impl("copy", &copy);
  m.impl("advise_huge_pages", &advise_huge_pages);
  m.impl("instruction_set", &instruction_set);
  m.impl("revision", &revision);
}

// `import megatron_dmc._cpu` registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
