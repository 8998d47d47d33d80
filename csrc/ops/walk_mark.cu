// Choices from stored tables, and marks. Bytes: a choice 32 and its search; a mark 9 and the sector
// of its word, read and written.

#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

using Unsigned = unsigned long long;

// Notes the first of `count` things that is refused, counted from the end: 0 is none.
__device__ __forceinline__ void refuse_at(int64_t* refused, int64_t i, int64_t count) {
  atomicMax(reinterpret_cast<Unsigned*>(refused), static_cast<Unsigned>(count - i));
}

__global__ void __launch_bounds__(kThreads)
    check_rows(const ChoiceTable table, const int64_t table_rows, const int64_t* rows,
               const int64_t count, ChoiceRefusals* found) {
  for (int64_t i = thread_of_grid(); i < table_rows; i += threads_of_grid()) {
    if (!table.is_row(i)) refuse_at(&found->start, i, table_rows);
  }
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    if (rows[i] < 0 || rows[i] >= table_rows) refuse_at(&found->row, i, count);
  }
  if (thread_of_grid() == 0) found->last_start = table.row_start[table_rows];
}

__global__ void __launch_bounds__(kThreads)
    choose(const ChoiceTable table, const int64_t* rows, const int64_t* walks, const int64_t count,
           const uint64_t seed, const int64_t step, const WalkWord word, int64_t* chosen) {
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    chosen[i] = choose_in_row(table, rows[i], walks[i], seed, step, word);
  }
}

// A place that several walks share is new to one of them, whichever comes first; how many are new
// does not depend on that.
__global__ void __launch_bounds__(kThreads)
    mark(const MarkedPlaces to, const int64_t begin, const int64_t end) {
  int64_t marked = 0;
  for (int64_t i = begin + thread_of_grid(); i < end; i += threads_of_grid()) {
    const int64_t place = to.edges[i];
    bool is_new = false;
    if (place >= to.places) {
      refuse_at(&to.found->refused, i, end);
    } else if (place >= 0) {
      const Unsigned bit = Unsigned{1} << (place % 64);
      is_new = !(atomicOr(reinterpret_cast<Unsigned*>(to.bits) + place / 64, bit) & bit);
    }
    to.is_new[i] = is_new;
    marked += is_new;
  }
  marked = warp_sum(marked);
  if (lane_of_thread() == 0 && marked) atomic_add(&to.found->marked, marked);
}

__global__ void __launch_bounds__(kThreads)
    unmark(const MarkedPlaces to, const int64_t begin, const int64_t end) {
  for (int64_t i = begin + thread_of_grid(); i < end; i += threads_of_grid()) {
    if (!to.is_new[i]) continue;
    const int64_t place = to.edges[i];
    atomicAnd(reinterpret_cast<Unsigned*>(to.bits) + place / 64, ~(Unsigned{1} << (place % 64)));
  }
}

}  // namespace

cudaError_t check_choices(const ChoiceTable& table, int64_t table_rows, const int64_t* rows,
                          int64_t count, ChoiceRefusals* found, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(found, 0, sizeof(*found), stream);
  if (error != cudaSuccess) return error;
  const int64_t most = table_rows > count ? table_rows : count;
  return launch(check_rows, blocks_for(most > 0 ? most : 1, kThreads), kThreads, stream, table,
                table_rows, rows, count, found);
}

cudaError_t choose_from_table(const ChoiceTable& table, const int64_t* rows, const int64_t* walks,
                              int64_t count, uint64_t seed, int64_t step, WalkWord word,
                              int64_t* chosen, cudaStream_t stream) {
  return launch(choose, blocks_for(count, kThreads), kThreads, stream, table, rows, walks, count,
                seed, step, word, chosen);
}

cudaError_t mark_places(const MarkedPlaces& to, int64_t begin, int64_t end, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(to.found, 0, sizeof(*to.found), stream);
  if (error != cudaSuccess) return error;
  return launch(mark, blocks_for(end - begin, kThreads), kThreads, stream, to, begin, end);
}

cudaError_t unmark_places(const MarkedPlaces& to, int64_t begin, int64_t end, cudaStream_t stream) {
  return launch(unmark, blocks_for(end - begin, kThreads), kThreads, stream, to, begin, end);
}

}  // namespace pathprune::cuda
