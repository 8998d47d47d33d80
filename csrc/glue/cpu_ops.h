// The ops as library_cpu.cpp registers them; python/pathprune/ops.py says what each one does.

#pragma once

#include <cstdint>
#include <tuple>

#include "glue/arguments.h"

namespace pathprune {

Tensor path_flow_linear(const Tensor& weight, const OptionalTensor& mask, const Tensor& x,
                        int64_t f, bool transposed, const OptionalTensor& layout,
                        const OptionalTensor& row_start, int64_t columns);

std::tuple<Tensor, Tensor, Tensor, Tensor> path_flow_linear_collect(
    const Tensor& weight, const OptionalTensor& mask, const Tensor& x, const Tensor& g, int64_t f,
    int64_t s, double lo, double hi, int64_t capacity, const OptionalTensor& layout,
    const OptionalTensor& row_start, int64_t columns);

Tensor path_flow_linear_prune_(const Tensor& weight, const Tensor& mask, const Tensor& x_old,
                               const Tensor& g_old, int64_t s, double at_least, double above,
                               int64_t cut, const Tensor& x, int64_t f,
                               const OptionalTensor& layout, const OptionalTensor& row_start,
                               int64_t columns);

Tensor through_flow(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                    const OptionalTensor& g, int64_t s, const OptionalTensor& layout,
                    const OptionalTensor& row_start, int64_t columns);

std::tuple<Tensor, Tensor, Tensor> through_flow_collect(
    const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
    const OptionalTensor& g, int64_t s, double lo, double hi, int64_t capacity,
    const OptionalTensor& layout, const OptionalTensor& row_start, int64_t columns);

std::tuple<Tensor, Tensor> through_flow_histogram(const Tensor& weight, const OptionalTensor& mask,
                                                  const OptionalTensor& x, const OptionalTensor& g,
                                                  int64_t s, int64_t stride,
                                                  const OptionalTensor& layout,
                                                  const OptionalTensor& row_start, int64_t columns);

void through_flow_prune_(const Tensor& weight, const Tensor& mask, const OptionalTensor& x,
                         const OptionalTensor& g, int64_t s, double at_least, double above,
                         int64_t cut, const OptionalTensor& layout, const OptionalTensor& row_start,
                         int64_t columns);

Tensor through_flow_nth(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                        const OptionalTensor& g, int64_t s, double at_least, double above,
                        int64_t n, const OptionalTensor& layout, const OptionalTensor& row_start,
                        int64_t columns);

Tensor masked_weight(const Tensor& weight, const OptionalTensor& mask, int64_t f);

Tensor mask_pack(const Tensor& bits);
Tensor mask_unpack(const Tensor& mask, int64_t columns);
Tensor mask_count(const Tensor& mask);

Tensor fingerprint(const Tensor& tensor);

std::tuple<Tensor, Tensor> compact_weight(const Tensor& weight, const Tensor& mask,
                                          const OptionalTensor& layout,
                                          const OptionalTensor& row_start, int64_t columns);

Tensor kth_largest(const Tensor& values, int64_t k);

Tensor gumbel_keys(const Tensor& scores, int64_t exponent, double temperature_inverse, int64_t seed,
                   int64_t offset);

std::tuple<Tensor, Tensor> walk_step(const Tensor& weight, const Tensor& units, const Tensor& walks,
                                     const OptionalTensor& mass, const OptionalTensor& gain,
                                     const OptionalTensor& valid, int64_t power, bool to_rows,
                                     int64_t seed, int64_t step);
Tensor walk_mass(const Tensor& weight, const OptionalTensor& valid, int64_t power);
std::tuple<Tensor, Tensor, Tensor> walk_field_step(const Tensor& weight, const Tensor& units,
                                                   const Tensor& positions, const Tensor& walks,
                                                   const Tensor& flow, const Tensor& leads_to,
                                                   int64_t power, bool to_rows, int64_t seed,
                                                   int64_t step);
Tensor walk_choose(const Tensor& cdf, const Tensor& row_start, const Tensor& rows,
                   const Tensor& walks, int64_t seed, int64_t step, int64_t word);
Tensor walk_mark_(const Tensor& bits, const Tensor& edges, int64_t target);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_index(const Tensor& layout,
                                                                const Tensor& row_start,
                                                                int64_t columns);

Tensor sparse_matmul(const Tensor& values, const Tensor& x, int64_t f, bool transposed,
                     int64_t kernel, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns);

Tensor sparse_sample(const Tensor& x, const Tensor& g, const Tensor& layout,
                     const Tensor& row_start, const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns);

Tensor sparse_gather(const Tensor& dense, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, int64_t columns);

Tensor sparse_scatter(const Tensor& values, const Tensor& layout, const Tensor& row_start,
                      const Tensor& index, int64_t columns);

Tensor thin_convolution(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                        int64_t stride_y, int64_t stride_x, int64_t padding_y, int64_t padding_x,
                        int64_t dilation_y, int64_t dilation_x, bool counting,
                        const OptionalTensor& mask);

Tensor thin_sample(const Tensor& x, const Tensor& g, const Tensor& mask, int64_t kernel_y,
                   int64_t kernel_x, int64_t stride_y, int64_t stride_x, int64_t padding_y,
                   int64_t padding_x, int64_t dilation_y, int64_t dilation_x);

}  // namespace pathprune
