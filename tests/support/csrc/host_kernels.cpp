// The kernels of megatron_dmc/csrc on a host, for tests/support/host_kernels.py: the same bodies, emulated.
#include <type_traits>

#include "emulator.h"

#include "dmc/append.h"
#include "dmc/attention.h"
#include "dmc/prefill.h"
#include "dmc/prefill_attention.h"
#include "dmc/release.h"

namespace {

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
int append_any(const dmc::AppendParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: append<T, S, 64>(p); return 0;
    case 96: append<T, S, 96>(p); return 0;
    case 128: append<T, S, 128>(p); return 0;
    case 256: append<T, S, 256>(p); return 0;
    default: return 1;
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
int prefill_attend_any(const dmc::PrefillAttentionParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: prefill_attend<T, 64>(p); return 0;
    case 96: prefill_attend<T, 96>(p); return 0;
    case 128: prefill_attend<T, 128>(p); return 0;
    case 256: prefill_attend<T, 256>(p); return 0;
    default: return 1;
  }
}

template <class T>
int prefill_write_any(const dmc::PrefillParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: prefill_write<T, 64>(p); return 0;
    case 96: prefill_write<T, 96>(p); return 0;
    case 128: prefill_write<T, 128>(p); return 0;
    case 256: prefill_write<T, 256>(p); return 0;
    default: return 1;
  }
}

template <class T>
int append_any(const dmc::AppendParams<T>& p) {
  switch (p.kv.stored) {
    case dmc::kNumbers: return append_any<T, T>(p);
    case dmc::kE4m3: return append_any<T, dmc::e4m3>(p);
    case dmc::kInt8: return append_any<T, dmc::int8>(p);
    default: return 1;
  }
}

template <class T, class S>
int attend_any(const dmc::AttentionParams<T>& p) {
  switch (p.kv.head_dim) {
    case 64: attend<T, S, 64>(p); return 0;
    case 96: attend<T, S, 96>(p); return 0;
    case 128: attend<T, S, 128>(p); return 0;
    case 256: attend<T, S, 256>(p); return 0;
    default: return 1;
  }
}

template <class T>
int attend_any(const dmc::AttentionParams<T>& p) {
  switch (p.kv.stored) {
    case dmc::kNumbers: return attend_any<T, T>(p);
    case dmc::kE4m3: return attend_any<T, dmc::e4m3>(p);
    case dmc::kInt8: return attend_any<T, dmc::int8>(p);
    default: return 1;
  }
}

}  // namespace

extern "C" {

int append_bf16(const dmc::AppendParams<dmc::bf16>* p) { return append_any(*p); }
int append_fp16(const dmc::AppendParams<dmc::fp16>* p) { return append_any(*p); }
int attend_bf16(const dmc::AttentionParams<dmc::bf16>* p) { return attend_any(*p); }
int attend_fp16(const dmc::AttentionParams<dmc::fp16>* p) { return attend_any(*p); }
int prefill_write_bf16(const dmc::PrefillParams<dmc::bf16>* p) { return prefill_write_any(*p); }
int prefill_write_fp16(const dmc::PrefillParams<dmc::fp16>* p) { return prefill_write_any(*p); }
int prefill_attend_bf16(const dmc::PrefillAttentionParams<dmc::bf16>* p) {
  return prefill_attend_any(*p);
}
int prefill_attend_fp16(const dmc::PrefillAttentionParams<dmc::fp16>* p) {
  return prefill_attend_any(*p);
}
int plan(const dmc::PlanParams* p) {
  int shared[8];
  emulator::launch(p->num_layers, 64, [&] { dmc::plan_layer(*p, shared); });
  return 0;
}
int release(const dmc::ReleaseParams* p) {
  emulator::launch(int((p->num_ids + 63) / 64), 64, [&] {
    const int64_t index = int64_t(dmc::block_index()) * 64 + dmc::thread_index();
    if (index < p->num_ids) dmc::release_page(*p, index);
  });
  return 0;
}
void set_lazy_copies(int lazy) { emulator::lazy_copies = lazy != 0; }
int sizes(int which) {
  const size_t all[] = {sizeof(dmc::AppendParams<dmc::bf16>),
                        sizeof(dmc::AttentionParams<dmc::bf16>), sizeof(dmc::PlanParams),
                        sizeof(dmc::ReleaseParams), sizeof(dmc::PrefillParams<dmc::bf16>),
                        sizeof(dmc::PrefillAttentionParams<dmc::bf16>)};
  return int(all[which]);
}
}
