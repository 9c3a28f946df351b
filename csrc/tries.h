// N-best lists as tries: prefixes that hypotheses share become one path.
#pragma once

#include <cstdint>
#include <vector>

namespace lowbit {

// Rows of words in groups, each group read after a prefix of its own. Views of arrays, checked before.
struct Lists {
  const int32_t* words;
  const int64_t* ends;  // [rows], where each row ends in `words`
  int64_t rows;
  const int64_t* group_ends;  // [groups], rows
  int64_t groups;
  const int32_t* prefixes;
  const int64_t* prefix_ends;  // [groups]; a prefix has at least one token
};

// A forest of nodes, and requests for log P(target | path to a node).
struct Tries {
  std::vector<int32_t> tokens, parents;  // of nodes; parents come first, those of a tree stand side by side
  std::vector<int64_t> nodes, targets;   // of requests
  std::vector<int64_t> paths, ends;      // requests of every distinct row, and where they end
  std::vector<int64_t> which;            // [rows] the distinct row; -1 where a row was left out
};

// The rows of a group as one trie, in the order of their words: every word of a row is asked for, and then `end`. Where a
// trie would grow beyond most_nodes, another one begins. Rows of more than most_words are left out.
Tries make_tries(const Lists& lists, int64_t most_words, int64_t most_nodes, int32_t end);

}  // namespace lowbit
