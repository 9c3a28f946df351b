// Canonical packed rows -> prepacked tiles (layout.h), and back to levels. Pure functions of their arguments.
#pragma once

#include "layout.h"

namespace lowbit {

// rows: [n][ceil(k * bits / 8)] canonical bytes. tiles: [ceil(n/16)][ceil(k/64)][128 * bits], fully
// overwritten.
void prepack_tiles(const uint8_t* rows, int64_t n, int64_t k, int bits, uint8_t* tiles);

// groups: fp16 bits [n][ceil(k / group)]. scales: [ceil(n/16)][ceil(k / span)][16], pad outputs 0.
void prepack_scales(const uint16_t* groups, int64_t n, int64_t k, int64_t group, int64_t span,
                    uint16_t* scales);

// The span that layout.h prescribes for a group: the group itself, or its largest part within kMaxSpan.
int64_t span_of(int64_t k, int64_t group);

// out[i, 0..k) = scale * level of row ids[i]; ids are in [0, n).
void dequantize_rows(const Matrix& w, const int64_t* ids, int64_t count, float* out);

float half_to_float(uint16_t bits);

}  // namespace lowbit
