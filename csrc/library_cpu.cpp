// Every registration of a CPU implementation.

#include <torch/csrc/stable/library.h>

#include "glue/cpu_ops.h"

STABLE_TORCH_LIBRARY_IMPL(pathprune, CPU, m) {
  m.impl("path_flow_linear", TORCH_BOX(&pathprune::path_flow_linear));
  m.impl("path_flow_linear_collect", TORCH_BOX(&pathprune::path_flow_linear_collect));
  m.impl("path_flow_linear_prune_", TORCH_BOX(&pathprune::path_flow_linear_prune_));
  m.impl("through_flow", TORCH_BOX(&pathprune::through_flow));
  m.impl("through_flow_collect", TORCH_BOX(&pathprune::through_flow_collect));
  m.impl("through_flow_histogram", TORCH_BOX(&pathprune::through_flow_histogram));
  m.impl("through_flow_prune_", TORCH_BOX(&pathprune::through_flow_prune_));
  m.impl("through_flow_nth", TORCH_BOX(&pathprune::through_flow_nth));
  m.impl("masked_weight", TORCH_BOX(&pathprune::masked_weight));
  m.impl("mask_pack", TORCH_BOX(&pathprune::mask_pack));
  m.impl("mask_unpack", TORCH_BOX(&pathprune::mask_unpack));
  m.impl("mask_count", TORCH_BOX(&pathprune::mask_count));
  m.impl("fingerprint", TORCH_BOX(&pathprune::fingerprint));
  m.impl("compact_weight", TORCH_BOX(&pathprune::compact_weight));
  m.impl("kth_largest", TORCH_BOX(&pathprune::kth_largest));
  m.impl("gumbel_keys", TORCH_BOX(&pathprune::gumbel_keys));
  m.impl("walk_step", TORCH_BOX(&pathprune::walk_step));
  m.impl("walk_mass", TORCH_BOX(&pathprune::walk_mass));
  m.impl("walk_field_step", TORCH_BOX(&pathprune::walk_field_step));
  m.impl("walk_choose", TORCH_BOX(&pathprune::walk_choose));
  m.impl("walk_mark_", TORCH_BOX(&pathprune::walk_mark_));
  m.impl("sparse_index", TORCH_BOX(&pathprune::sparse_index));
  m.impl("sparse_matmul", TORCH_BOX(&pathprune::sparse_matmul));
  m.impl("sparse_sample", TORCH_BOX(&pathprune::sparse_sample));
  m.impl("sparse_gather", TORCH_BOX(&pathprune::sparse_gather));
  m.impl("sparse_scatter", TORCH_BOX(&pathprune::sparse_scatter));
  m.impl("thin_convolution", TORCH_BOX(&pathprune::thin_convolution));
  m.impl("thin_sample", TORCH_BOX(&pathprune::thin_sample));
}
