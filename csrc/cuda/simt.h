// The names of device.cuh on a CPU: runs the kernels' own source, one block after the other, threads as fibers.
//
// What it checks while it runs: every global access lies inside a registered array, and follows wait_for_previous();
// lanes of a warp meet at the same mma; barriers are reached by all threads; asynchronous copies arrive, and products of
// warp groups read their operands, only when they are waited for (until then the target of a copy holds NaNs, as all
// shared memory does at the start); threads are resumed in an order that changes with the seed, so that a missing
// barrier changes results. It counts shared-memory wavefronts of 16-byte accesses.
#pragma once

#include "simt_machine.h"

namespace lowbit::gpu {

inline int thread_index() { return simt::machine().running->index; }
inline int block_x() { return simt::machine().block[0]; }
inline int block_y() { return simt::machine().block[1]; }
inline int grid_x() { return simt::machine().grid[0]; }
inline int grid_y() { return simt::machine().grid[1]; }
inline void barrier() { simt::machine().wait(simt::State::kAtBarrier); }
inline void fence() {}
inline char* shared_memory() { return simt::machine().shared(); }

template <class V>
V load_global(const V* p) {
  simt::machine().check(p, sizeof(V));
  return *p;
}
inline Vec4 load_stream(const Vec4* p) { return load_global(p); }
inline void prefetch_l2(const Vec4* p) { simt::machine().check_extent(p, sizeof(Vec4)); }
inline void let_next_start() {}
inline void wait_for_previous() { simt::machine().running->waited = true; }
template <class V>
V load_coherent(const V* p) {
  return load_global(p);
}
template <class V>
void store_global(V* p, V value) {
  simt::machine().check(p, sizeof(V));
  *p = value;
}
inline int add_atomic(int* p, int value) {
  simt::machine().check(p, sizeof(int));
  return std::exchange(*p, *p + value);
}
template <class V>
V load_shared(const V* p) {
  simt::machine().check_shared(p, sizeof(V));
  return *p;
}
template <class V>
void store_shared(V* p, V value) {
  simt::machine().check_shared(p, sizeof(V));
  *p = value;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  simt::Machine& m = simt::machine();
  m.check_shared(shared, 16);
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    m.fail("bad asynchronous copy");
  if (bytes > 0) m.check(global, static_cast<size_t>(bytes));
  std::memset(shared, 0xFF, 16);
  m.running->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes});
}
inline void commit_copies() {
  simt::Thread& t = *simt::machine().running;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
template <int kPending>
void wait_copies() {
  simt::Thread& t = *simt::machine().running;
  while (t.groups.size() > kPending) {
    for (const simt::Copy& c : t.groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
    t.groups.pop_front();
  }
}

template <class T>
void mma(T, float (&d)[4], const uint32_t* a, const uint32_t* b) {
  simt::Machine& m = simt::machine();
  m.running->mma = {d, a, b, T::kWindow == Bf16::kWindow};
  m.wait(simt::State::kAtMma);
}

template <class T>
void wgmma(T, float (&d)[16][4], const uint32_t* a, const Vec4* b, int step) {
  simt::machine().running->begun.push_back(
      {d, a, reinterpret_cast<const char*>(b), step, T::kWindow == Bf16::kWindow});
}
inline void begin_products() {}
inline void publish_shared() {}
inline void commit_products() {
  simt::Thread& t = *simt::machine().running;
  t.products.push_back(std::move(t.begun));
  t.begun.clear();
}
template <int kPending>
void wait_products() {
  simt::Machine& m = simt::machine();
  m.running->pending = kPending;
  if (m.running->products.size() > kPending) m.wait(simt::State::kAtProducts);
}

}  // namespace lowbit::gpu
