// The CUDA implementation of the ops, without torch: pointers to device memory, sizes and a stream
// in, an error code out. Nothing here allocates or waits; an op of several steps takes the
// workspace that the function beside it measures. Letters as in the schemas: G groups, O rows, K
// columns, T positions, W words; A is the type of flows and scores (weights.h), `void*` where it is
// either.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/weight_map.h"
#include "ops/gumbel.h"
#include "ops/walk.h"
#include "ops/weights.h"

namespace pathprune::cuda {

// ---- what the ops are given ---------------------------------------------------------------------

struct StoredWeights {
  Weights all;
  const int64_t* tile_start;  // packed: from fill_tile_starts, or all.row_start if that says so

  bool packed() const { return all.layout != nullptr; }
};

// How many tile starts the words of packed rows need; 0: their row starts serve.
int64_t tile_start_count(int64_t flat_rows, int64_t words);
cudaError_t fill_tile_starts(const uint16_t* words,     // [flat_rows, W]
                             const int64_t* row_start,  // [flat_rows + 1]
                             int64_t flat_rows, int64_t columns, int64_t words_of_row,
                             int64_t* tile_start,  // [tile_start_count(flat_rows, W)]
                             cudaStream_t stream);

struct Score {
  WeightMap s;
  bool has_flows;  // if not, the score is s(w)
  const void* x;   // [G, T, K] A
  const void* g;   // [G, T, O] A
  int64_t positions;
};

struct Flow {
  WeightMap f;
  const void* in;  // A: [G, T, K], transposed [G, T, O]
  void* out;       // A: [G, T, O], transposed [G, T, K]
  int64_t positions;
};

struct Collected {
  double lo, hi;
  void* values;  // [capacity] A
  int64_t capacity;
  int64_t* counts;   // [4]: above, inside, not finite, live
  double* extremes;  // [2]
};

// ---- row_sweep.cu -------------------------------------------------------------------------------

cudaError_t flow_by_rows(const StoredWeights& w, const Flow& flow, cudaStream_t stream);
// First prunes the mask, which `w` has too, then lets the flow through what is left. No positions:
// prunes only.
cudaError_t prune_by_rows(const StoredWeights& w, const Score& score, double at_least, double above,
                          int64_t cut, uint16_t* mask, const Flow& flow, cudaStream_t stream);

// ---- column_sweep.cu ----------------------------------------------------------------------------

// How many sums (A) the transposed flow needs room for.
int64_t column_sum_count(const Weights& w, int64_t positions);
cudaError_t flow_by_columns(const StoredWeights& w, const Flow& flow, void* sums,
                            cudaStream_t stream);
// The transposed flow and a collection of scores. No positions: collects only.
cudaError_t collect_by_columns(const StoredWeights& w, const Score& score,
                               const Collected& collected, const Flow& flow, void* sums,
                               cudaStream_t stream);

// ---- through_flow.cu ----------------------------------------------------------------------------

cudaError_t write_scores(const StoredWeights& w, const Score& score,
                         void* scores,  // [G, O, K] A
                         cudaStream_t stream);
cudaError_t count_by_bin(const StoredWeights& w, const Score& score, int64_t stride,
                         int64_t* histogram,  // [2^17], float64 weights [2^20]
                         int64_t* counts,     // [2]: visited, not finite
                         cudaStream_t stream);
// How many counts find_nth needs room for.
int64_t nth_count_count(const Weights& w);
cudaError_t find_nth(const StoredWeights& w, const Score& score, double at_least, double above,
                     int64_t n, int64_t* counts,
                     int64_t* index,  // []
                     cudaStream_t stream);

// ---- masks.cu -----------------------------------------------------------------------------------

cudaError_t pack_masks(const uint8_t* bools,  // [rows, K]
                       int64_t rows, int64_t columns,
                       uint16_t* words,  // [rows, W]
                       cudaStream_t stream);
cudaError_t unpack_masks(const uint16_t* words, int64_t rows, int64_t columns, uint8_t* bools,
                         cudaStream_t stream);
cudaError_t count_masks(const uint16_t* words, int64_t count,
                        int64_t* total,  // []
                        cudaStream_t stream);

// ---- fingerprint.cu -----------------------------------------------------------------------------

cudaError_t add_fingerprint(const uint8_t* bytes, int64_t size,
                            int64_t* sum,  // []
                            cudaStream_t stream);

// ---- compact.cu ---------------------------------------------------------------------------------

// The row starts of what a mask leaves; the last is how much that is.
cudaError_t row_start_bytes(int64_t flat_rows, size_t* bytes);
cudaError_t fill_row_starts(const uint16_t* words, int64_t flat_rows, int64_t columns,
                            int64_t words_of_row, void* workspace, size_t bytes,
                            int64_t* row_start,  // [flat_rows + 1]
                            cudaStream_t stream);
// Moves the live weights of `w` to where the starts of the tiles of its mask say, and writes the
// padding behind the `live` of them.
cudaError_t compact(const StoredWeights& w, const int64_t* tile_start, int64_t live, void* values,
                    cudaStream_t stream);

// ---- select.cu ----------------------------------------------------------------------------------

size_t kth_largest_bytes(Storage storage);
cudaError_t find_kth_largest(const void* values, Storage storage, int64_t count, int64_t k,
                             void* workspace, void* result, cudaStream_t stream);

// ---- gumbel.cu ----------------------------------------------------------------------------------

cudaError_t fill_gumbel_keys(const void* scores, Storage storage, int64_t count,
                             const GumbelKeys& key_of, double* keys,
                             double* refused,  // []: a score that is negative or NaN, or 0
                             cudaStream_t stream);

// ---- walk_step.cu -------------------------------------------------------------------------------

cudaError_t walk_step_bytes(const WalkMatrix& m, int64_t walkers, size_t* bytes);
// Counts the walkers at each unit. The workspace begins with an int64: walkers.count - i of the
// first walker i whose unit the matrix has not; 0: there is none, and they can be moved.
cudaError_t count_walkers_at_units(const WalkMatrix& m, const Walkers& walkers, void* workspace,
                                   cudaStream_t stream);
cudaError_t move_counted_walkers(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
                                 void* workspace, cudaStream_t stream);

// ---- walk_field.cu ------------------------------------------------------------------------------

cudaError_t sum_walk_kernels(const WalkMatrix& m, const WalkRule& rule,
                             double* mass,  // [G, R, C]
                             cudaStream_t stream);

struct FieldSizes {
  int64_t walkers;
  int64_t units;   // of the matrix
  int64_t places;  // positions on the side of the walkers
  int64_t leads;   // places times entries
};

struct FieldRefusals {     // each counted from the end; 0: none
  int64_t unit, position;  // of walkers
  int64_t lead;
};

cudaError_t check_field_places(const WalkField& field, const FieldSizes& sizes,
                               const int64_t* units,  // [walkers]
                               FieldRefusals* found, cudaStream_t stream);
// For places that were found to be there.
cudaError_t move_walkers_in_field(const WalkMatrix& m, const WalkRule& rule, const WalkField& field,
                                  const Walkers& walkers, cudaStream_t stream);

// ---- walk_mark.cu -------------------------------------------------------------------------------

struct ChoiceRefusals {
  int64_t start;       // table_rows - i of the first row i that is none, or 0
  int64_t row;         // count - i of the first walker i whose row the table has not, or 0
  int64_t last_start;  // where the table must not end before
};

cudaError_t check_choices(const ChoiceTable& table, int64_t table_rows, const int64_t* rows,
                          int64_t count, ChoiceRefusals* found, cudaStream_t stream);
// For rows that were found to be there.
cudaError_t choose_from_table(const ChoiceTable& table, const int64_t* rows, const int64_t* walks,
                              int64_t count, uint64_t seed, int64_t step, WalkWord word,
                              int64_t* chosen, cudaStream_t stream);

struct Marked {
  int64_t marked;   // how many places are new
  int64_t refused;  // end - i of the first edge i that is past the places, or 0
};

struct MarkedPlaces {
  uint64_t* bits;
  int64_t places;
  const int64_t* edges;
  uint8_t* is_new;  // of each edge
  Marked* found;    // []
};

// Marks edges[begin, end). To unmark them again changes back the bits that were new.
cudaError_t mark_places(const MarkedPlaces& to, int64_t begin, int64_t end, cudaStream_t stream);
cudaError_t unmark_places(const MarkedPlaces& to, int64_t begin, int64_t end, cudaStream_t stream);

}  // namespace pathprune::cuda
