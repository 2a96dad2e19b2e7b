// The launches of megatron_dmc/csrc/kernels.h on a host, for tests/support/host_kernels.py: the same kernels, emulated.
#include <type_traits>

#include "emulator.h"

#include "kernels.h"

namespace {

[[maybe_unused]] const bool is_lazy = [] {
  const char* lazy = std::getenv("DMC_LAZY_COPIES");
  return emulator::lazy_copies = lazy && *lazy == '1';
}();

// A block's shared memory, full of NaN at first as a GPU's may be.
std::vector<float> nan_memory(size_t bytes) {
  return std::vector<float>(bytes / 4 + 8, std::nanf(""));
}
char* aligned(std::vector<float>& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

// Of fp16 with 8-bit pages one head dimension is enough to try, and quicker to compile.
template <class T, class S, int kHeadDim>
constexpr bool is_built = kHeadDim == 64 || !dmc::is_8bit<S> || std::is_same_v<T, dmc::bf16>;

template <class T, class S, int kHeadDim, bool kDelayed>
void append(const dmc::AppendParams<T>& p) {
  emulator::launch(p.num_requests * p.num_kv_heads, dmc::kWarp,
                   [&] { dmc::append_token<T, S, kHeadDim, kDelayed>(p, dmc::block_index()); });
}

template <class T, class S, int kHeadDim>
void append(const dmc::AppendParams<T>& p) {
  if constexpr (is_built<T, S, kHeadDim>) {
    if (p.delay) {
      append<T, S, kHeadDim, true>(p);
    } else {
      append<T, S, kHeadDim, false>(p);
    }
  }
}

template <class T, class S, int kHeadDim, int kQueryBlocks>
void attend(const dmc::AttentionParams<T>& p) {
  auto memory = nan_memory(dmc::kWarpsPerBlock * dmc::Stages<S, kHeadDim>::kBytes);
  emulator::launch((p.num_workers + dmc::kWarpsPerBlock - 1) / dmc::kWarpsPerBlock,
                   dmc::kWarpsPerBlock * dmc::kWarp,
                   [&] { dmc::attend_stretch<T, S, kHeadDim, kQueryBlocks>(p, aligned(memory)); });
  emulator::launch(p.num_requests * p.num_kv_heads * p.group, dmc::kWarp,
                   [&] { dmc::join_parts<T, kHeadDim>(p, dmc::block_index()); });
}

template <class T, class S, int kHeadDim>
void attend(const dmc::AttentionParams<T>& p) {
  if constexpr (is_built<T, S, kHeadDim>) {
    if (p.group <= 8) {
      attend<T, S, kHeadDim, 1>(p);
    } else {
      attend<T, S, kHeadDim, 2>(p);
    }
  }
}

template <class T, class S>
cudaError_t append_any(const dmc::AppendParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: append<T, S, 64>(p); return cudaSuccess;
    case 96: append<T, S, 96>(p); return cudaSuccess;
    case 128: append<T, S, 128>(p); return cudaSuccess;
    case 256: append<T, S, 256>(p); return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

template <class T, int kHeadDim>
void prefill_write(const dmc::PrefillParams<T>& p) {
  const int tiles = p.num_tiles * p.num_kv_heads, heads = p.num_chunks * p.num_kv_heads;
  if (p.is_merge_TG) {
    emulator::launch(tiles, dmc::kWarp,
                     [&] { dmc::sum_tail<T, kHeadDim>(p, dmc::block_index()); });
    const int parts =
        p.merge_window ? 1 : (2 * kHeadDim + dmc::kCarryThreads) / dmc::kCarryThreads;
    emulator::launch(heads * parts, dmc::kCarryThreads, [&] { dmc::carry_sums<T, kHeadDim>(p); });
  }
  emulator::launch(tiles, dmc::kWarp,
                   [&] { dmc::write_tile<T, kHeadDim>(p, dmc::block_index()); });
  if (p.is_merge_TG && p.merge_window) {
    emulator::launch(heads, dmc::kWarp,
                     [&] { dmc::keep_latest<T, kHeadDim>(p, dmc::block_index()); });
  }
}

template <class T, int kHeadDim, bool kDelayed>
void prefill_attend(const dmc::PrefillAttentionParams<T>& p) {
  using Sizes = dmc::PrefillSizes<kHeadDim, kDelayed>;
  auto memory = nan_memory(Sizes::kBytes);
  emulator::launch(p.num_tiles * p.num_kv_heads, Sizes::kThreads,
                   [&] { dmc::attend_tile<T, kHeadDim, kDelayed>(p, aligned(memory)); });
}

template <class T, int kHeadDim>
void prefill_attend(const dmc::PrefillAttentionParams<T>& p) {
  if (p.delay) {
    prefill_attend<T, kHeadDim, true>(p);
  } else {
    prefill_attend<T, kHeadDim, false>(p);
  }
}

template <class T>
cudaError_t prefill_attend_any(const dmc::PrefillAttentionParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: prefill_attend<T, 64>(p); return cudaSuccess;
    case 96: prefill_attend<T, 96>(p); return cudaSuccess;
    case 128: prefill_attend<T, 128>(p); return cudaSuccess;
    case 256: prefill_attend<T, 256>(p); return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t prefill_write_any(const dmc::PrefillParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: prefill_write<T, 64>(p); return cudaSuccess;
    case 96: prefill_write<T, 96>(p); return cudaSuccess;
    case 128: prefill_write<T, 128>(p); return cudaSuccess;
    case 256: prefill_write<T, 256>(p); return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t append_any(const dmc::AppendParams<T>& p) {
  switch (p.kv.stored) {
    case dmc::kNumbers: return append_any<T, T>(p);
    case dmc::kE4m3: return append_any<T, dmc::e4m3>(p);
    case dmc::kInt8: return append_any<T, dmc::int8>(p);
    default: return cudaErrorInvalidValue;
  }
}

template <class T, class S>
cudaError_t attend_any(const dmc::AttentionParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: attend<T, S, 64>(p); return cudaSuccess;
    case 96: attend<T, S, 96>(p); return cudaSuccess;
    case 128: attend<T, S, 128>(p); return cudaSuccess;
    case 256: attend<T, S, 256>(p); return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t attend_any(const dmc::AttentionParams<T>& p) {
  switch (p.kv.stored) {
    case dmc::kNumbers: return attend_any<T, T>(p);
    case dmc::kE4m3: return attend_any<T, dmc::e4m3>(p);
    case dmc::kInt8: return attend_any<T, dmc::int8>(p);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

namespace dmc {

template <class T>
cudaError_t launch_append(const AppendParams<T>& p, cudaStream_t) {
  return append_any(p);
}
template <class T>
cudaError_t launch_attention(const AttentionParams<T>& p, cudaStream_t) {
  return attend_any(p);
}
template <class T>
cudaError_t launch_prefill_write(const PrefillParams<T>& p, cudaStream_t) {
  return prefill_write_any(p);
}
template <class T>
cudaError_t launch_prefill_attention(const PrefillAttentionParams<T>& p, cudaStream_t) {
  return prefill_attend_any(p);
}
template cudaError_t launch_append(const AppendParams<bf16>&, cudaStream_t);
template cudaError_t launch_append(const AppendParams<fp16>&, cudaStream_t);
template cudaError_t launch_attention(const AttentionParams<bf16>&, cudaStream_t);
template cudaError_t launch_attention(const AttentionParams<fp16>&, cudaStream_t);
template cudaError_t launch_prefill_write(const PrefillParams<bf16>&, cudaStream_t);
template cudaError_t launch_prefill_write(const PrefillParams<fp16>&, cudaStream_t);
template cudaError_t launch_prefill_attention(const PrefillAttentionParams<bf16>&, cudaStream_t);
template cudaError_t launch_prefill_attention(const PrefillAttentionParams<fp16>&, cudaStream_t);

cudaError_t launch_plan(const PlanParams& p, cudaStream_t) {
  int shared[8];
  emulator::launch(p.num_layers, 64, [&] { plan_layer(p, shared); });
  return cudaSuccess;
}

cudaError_t launch_release(const ReleaseParams& p, cudaStream_t) {
  emulator::launch(int((p.num_ids + 63) / 64), 64, [&] {
    const int64_t index = int64_t(block_index()) * 64 + thread_index();
    if (index < p.num_ids) release_page(p, index);
  });
  return cudaSuccess;
}

cudaError_t count_workers(int, Stored, int* count) {
  *count = 5;
  return cudaSuccess;
}

}  // namespace dmc
