// The Transformer forward over nodes of a token forest: a node attends to its ancestors.
//
// One parallel region a forward; docs/ENGINE.md has the picture.
#pragma once

#include <cstdint>
#include <vector>

#include "forward_digits.h"
#include "forward_ops.h"
#include "qlinear.h"
#include "workspace.h"

namespace lowbit {

struct Linear {
  Matrix w;
  const float* bias = nullptr;  // [N] or null
};

struct Layer {
  Linear q, k, v, o, fc1, fc2;
  NormWeights norm1, norm2;
};

// Views of memory that the owner of the model keeps.
struct Model {
  int64_t vocab = 0, d = 0, heads = 0, ffn = 0, max_len = 0;
  bool pre_norm = true, rotary = false;
  Activation activation = kGelu;
  Compute compute = Compute::kInt8;
  Matrix embed;  // row t, times sqrt(d), embeds token t
  Linear head;   // the output layer; embed's matrix where tied
  std::vector<Layer> layers;
  NormWeights norm;  // before the output layer, where pre_norm
  // Rotary: cosines, then sines, [2, max_len, head_dim / 2]. Otherwise what is added to embeddings, [max_len, D].
  const float* positions = nullptr;

  const DigitOps* digits = nullptr;  // attention in integers, of deep nodes; null: none

  int64_t head_dim() const { return d / heads; }
  DigitRecord record() const { return {heads, head_dim()}; }
};

// Where the time of a forward goes: rows between products, matrix products, attention, reducing logits, waiting.
enum Phase { kRows, kProducts, kAttention, kReduce, kWait, kPhases };

// A wanted log P: of `token` after output row `row`.
struct Target {
  int32_t token, row;
  int64_t out;
};

// One forward. Node i stands at position positions[i]; the slots of the positions[i] + 1 tokens that it sees, its
// own last, are slots[path[i]] and following. In a slot, the key of layer l lies at l * layer_stride and its
// value value_offset further. While scoring, layers take turns in the same place: layer_stride is 0.
struct Batch {
  int64_t nodes = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int64_t* path = nullptr;
  float* const* slots = nullptr;
  int64_t layer_stride = 0, value_offset = 0;

  // Null, or for nodes [16 b, 16 b + 16) the slots [seen_first[b], seen_first[b + 1]) that any of them sees that is not
  // deep, from the roots on; bit i of seen_by says whether node 16 b + i sees one. All bits without such a node are set.
  const int64_t* seen_first = nullptr;
  float* const* seen = nullptr;
  const uint16_t* seen_by = nullptr;
  int64_t most_seen = 0;  // by one block
  // Null, or what deep nodes see: see DigitHead. Records lie record_offset floats after a layer's key.
  const int64_t* key_first = nullptr;
  const int32_t* key_blocks = nullptr;
  const uint16_t* key_masks = nullptr;
  const uint8_t* key_used = nullptr;
  float* const* key_slots = nullptr;
  int64_t keys = 0, most_key_blocks = 0, record_offset = 0;

  int64_t rows = 0;  // of output
  const int32_t* row_nodes =
      nullptr;                      // ascending; without nodes `hidden` already holds the output of one row
  float* hidden = nullptr;          // [D] or null: keeps the output of the last row
  const Target* targets = nullptr;  // ascending by token
  int64_t target_count = 0;
  float* log_probs = nullptr;  // of the targets
  float* all = nullptr;        // [V] or null: log P of every token after the only row

  double* seconds = nullptr;  // null, or [kPhases]: what member 0 spends is added

  bool together() const { return seen_first != nullptr; }
  bool wants_logits() const { return target_count > 0 || all != nullptr; }
};

// Outputs whose maximum and sum are taken together. A constant, so that log P of a token is the same number in any
// batch and on any number of threads.
constexpr int64_t kPart = 256;

constexpr int64_t kTogether = 16;  // nodes of a block of attention

// Nodes at this position and after it are deep: where the model has digits, they attend in integers. Before it, making
// digits takes longer than the products. A constant, so that a node's numbers do not depend on those beside it.
constexpr int32_t kDeep = 32;

// How a forward is divided, and its memory. Pointers named each_* hold one piece a member of the team.
struct Frame {
  int threads = 1;
  // With few rows a barrier costs more than the work: every member prepares all of them, in memory of its own.
  bool redundant = false;
  int64_t parts = 0;   // of kPart outputs, in which the output layer is reduced
  int64_t stripe = 0;  // parts that are multiplied at a time

  float* x;           // [nodes, D]; one a member where redundant
  float* q;           // [nodes, D]; becomes the attention's output
  float *k, *v;       // [nodes, kv_stride]
  int64_t kv_stride;  // D and a cache line: rows 2048 bytes apart would share few sets of the L1 cache
  uint8_t* records;   // [nodes], digits of keys and values while scoring; none where no node is deep
  float* branch;      // [nodes, D], of attention or MLP, not yet added to x
  float* h;           // [nodes, F]
  float *part_max, *part_sum;    // [rows, parts rounded up to 16]
  float *lse, *target_logits;    // [rows], [targets]
  float* each_row;               // [max(D, F)]
  float* each_dense;             // exact: the rows that the next product reads; shared unless redundant
  float* each_scores;            // room for attention, and to combine parts
  float* each_logits;            // [rows, stripe * kPart]; [V], shared, where all are wanted
  uint8_t* each_activations[3];  // of up to three forms (q, k and v); shared unless redundant
  uint8_t* each_scratch;         // of the kernels
  int64_t x_share, row_share, dense_share, scores_share, logits_share, activations_share[3], scratch_share;
};

// Threads that are worth waking for a forward over so many nodes.
int threads_for(const Model& model, int64_t nodes);

// Lays out a forward; over a null base it only counts.
Frame lay_out(const Model& model, const Batch& batch, int threads, Bump& memory);

void forward(const Model& model, const Batch& batch, const Frame& frame);

}  // namespace lowbit
