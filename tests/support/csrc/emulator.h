// Runs kernels on a host: the threads of a block are fibers that take turns, and the functions of a warp
// that dmc/platform.h declares exchange values between them. Layouts of matrix products are those that
// PTX documents for ldmatrix, movmatrix and mma.m16n8k16.
//
// Asynchronous copies happen when they are issued (eager) or when they are waited for (lazy): a missing
// wait shows in the latter, and a stage that is overwritten too early in the former.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "dmc/platform.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int exchanges = 0, barriers = 0;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
};

struct Slot {
  uint32_t words[8] = {};
  const void* row = nullptr;
};

inline bool lazy_copies = false;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Slot> slots;  // [2][threads]
inline std::function<void()> body;
inline int current, block;

inline Fiber& self() { return fibers[current]; }
inline void yield() { swapcontext(&self().context, &scheduler); }
inline void enter() {
  body();
  self().done = true;
  yield();
}

inline void run_block(int threads) {
  fibers.clear();
  fibers.resize(threads);
  slots.assign(2 * threads, Slot{});
  constexpr size_t kStack = 256 << 10;
  for (Fiber& fiber : fibers) {
    fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (current = 0; current < threads; ++current) {
      if (self().done) continue;
      any = true;
      swapcontext(&scheduler, &self().context);
    }
  }
  for (Fiber& fiber : fibers) {
    for (Fiber& other : fibers) {
      if (fiber.barriers != other.barriers) {
        std::fprintf(stderr, "threads of a block passed different numbers of barriers\n");
        std::abort();
      }
    }
  }
}

// Calls `kernel` for every thread of every block, blocks one after the other.
inline void launch(int blocks, int threads, std::function<void()> kernel) {
  body = std::move(kernel);
  for (block = 0; block < blocks; ++block) run_block(threads);
}

// Give a value to the warp and see everybody's. Valid until this thread's next exchange but one.
inline const Slot* exchange(const Slot& mine) {
  const int threads = int(fibers.size()), first = current / dmc::kWarp * dmc::kWarp;
  Slot* buffer = slots.data() + (self().exchanges % 2) * threads;
  buffer[current] = mine;
  const int turn = ++self().exchanges;
  for (bool all = false; !all;) {
    all = true;
    for (int i = first; i < first + dmc::kWarp && i < threads; ++i) {
      if (fibers[i].exchanges < turn && fibers[i].done) {
        std::fprintf(stderr, "a lane has left while its warp exchanges values\n");
        std::abort();
      }
      all = all && fibers[i].exchanges >= turn;
    }
    if (!all) yield();
  }
  return buffer + first;
}

inline void perform(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

inline uint32_t word(const Slot& slot, int i) { return slot.words[i]; }
inline uint16_t half_of(uint32_t pair, int i) { return uint16_t(i ? pair >> 16 : pair); }

}  // namespace emulator

namespace dmc {

using emulator::exchange;
using emulator::Slot;

inline int lane_index() { return emulator::current % kWarp; }
int thread_index() { return emulator::current; }
int block_index() { return emulator::block; }
int block_size() { return int(emulator::fibers.size()); }

void sync_warp() { exchange(Slot{}); }
void sync_block() {
  const int turn = ++emulator::self().barriers;
  for (bool all = false; !all;) {
    all = true;
    for (const emulator::Fiber& fiber : emulator::fibers) {
      all = all && (fiber.done || fiber.barriers >= turn);
    }
    if (!all) emulator::yield();
  }
}
int shuffle(int x, int lane) { return int(exchange(Slot{{uint32_t(x)}})[lane].words[0]); }
int shuffle_up(int x, int by) {
  const Slot* all = exchange(Slot{{uint32_t(x)}});
  const int from = lane_index() - by;
  return from < 0 ? x : int(all[from].words[0]);
}
float shuffle_xor(float x, int mask) {
  Slot mine{};
  std::memcpy(mine.words, &x, 4);
  float out;
  std::memcpy(&out, exchange(mine)[lane_index() ^ mask].words, 4);
  return out;
}
uint32_t largest_of_warp(uint32_t x) {
  const Slot* all = exchange(Slot{{x}});
  uint32_t most = 0;
  for (int i = 0; i < kWarp; ++i) most = all[i].words[0] > most ? all[i].words[0] : most;
  return most;
}
int count_lanes(bool x) {
  const Slot* all = exchange(Slot{{uint32_t(x)}});
  int count = 0;
  for (int i = 0; i < kWarp; ++i) count += int(all[i].words[0]);
  return count;
}
int atomic_add(int32_t* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}

void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    std::fprintf(stderr, "a copy of 16 bytes is not aligned\n");
    std::abort();
  }
  const emulator::Copy copy{to, from, valid};
  if (emulator::lazy_copies) {
    emulator::self().open_group.push_back(copy);
  } else {
    emulator::perform(copy);
  }
}
void copy_async_commit() {
  auto& self = emulator::self();
  self.groups.push_back(std::move(self.open_group));
  self.open_group.clear();
}
void copy_async_wait_for(int pending) {
  auto& groups = emulator::self().groups;
  while (int(groups.size()) > pending) {
    for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
    groups.erase(groups.begin());
  }
}

inline uint32_t two(const void* row, int column) {
  uint32_t out;
  std::memcpy(&out, static_cast<const uint16_t*>(row) + column, 4);
  return out;
}
inline uint32_t one(const void* row, int column) {
  return static_cast<const uint16_t*>(row)[column];
}
void load_matrices(uint32_t (&out)[4], const void* row) {
  const Slot* all = exchange(Slot{{}, row});
  const int lane = lane_index();
  for (int m = 0; m < 4; ++m) out[m] = two(all[8 * m + lane / 4].row, lane % 4 * 2);
}
void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const Slot* all = exchange(Slot{{}, row});
  const int lane = lane_index();
  for (int m = 0; m < 4; ++m) {
    const int r = 8 * m + lane % 4 * 2;
    out[m] = one(all[r].row, lane / 4) | one(all[r + 1].row, lane / 4) << 16;
  }
}
uint32_t transpose_matrix(uint32_t x) {
  const Slot* all = exchange(Slot{{x}});
  const int lane = lane_index();
  const auto element = [&](int row, int column) {
    return uint32_t(emulator::half_of(all[row * 4 + column / 2].words[0], column % 2));
  };
  const int row = lane % 4 * 2, column = lane / 4;
  return element(row, column) | element(row + 1, column) << 16;
}

template <class T>
void multiply_add_(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Slot* all = exchange(Slot{{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const auto value = [](uint32_t pair, int i) { return to_float(T{emulator::half_of(pair, i)}); };
  // a: rows lane / 4 (+ 8 in words 1, 3), columns lane % 4 * 2 (+ 8 in words 2, 3); b likewise
  const auto a_at = [&](int row, int k) {
    return value(all[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2], k % 2);
  };
  const auto b_at = [&](int k, int column) {
    return value(all[column * 4 + k % 8 / 2].words[4 + k / 8], k % 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane_index() / 4 + i / 2 * 8, column = lane_index() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += a_at(row, k) * b_at(k, column);
  }
}
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  multiply_add_<bf16>(c, a, b);
}
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  multiply_add_<fp16>(c, a, b);
}

}  // namespace dmc
