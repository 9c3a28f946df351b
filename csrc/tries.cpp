#include "tries.h"

#include <algorithm>

namespace lowbit {
namespace {

struct Words {
  const int32_t* begin;
  const int32_t* end;
  int64_t row;

  int64_t size() const { return end - begin; }
  bool operator<(const Words& o) const { return std::lexicographical_compare(begin, end, o.begin, o.end); }
  int64_t common(const Words& o) const {
    const int64_t most = std::min(size(), o.size());
    return std::mismatch(begin, begin + most, o.begin).first - begin;
  }
};

class Builder {
 public:
  explicit Builder(int64_t most_nodes, int32_t end) : most_nodes_(most_nodes), end_(end) {}

  // Rows in ascending order: one shares with the row before all that it shares with any before.
  void add_group(const int32_t* prefix, int64_t length, const std::vector<Words>& rows) {
    const Words* before = nullptr;
    for (const Words& row : rows) {
      const int64_t common = before == nullptr ? 0 : row.common(*before);
      if (before == nullptr || common < row.size() || common < before->size()) {
        add(prefix, length, row, before == nullptr ? 0 : length + common);
      }
      out.which[static_cast<size_t>(row.row)] = static_cast<int64_t>(out.ends.size()) - 1;
      before = &row;
    }
  }

  Tries out;

 private:
  // The first `shared` tokens, prefix included, have the nodes of the row before.
  void add(const int32_t* prefix, int64_t length, const Words& row, int64_t shared) {
    const int64_t count = length + row.size();
    const auto token = [&](int64_t i) {
      return i < length ? prefix[i] : i < count ? row.begin[i - length] : end_;
    };
    if (size_ + count - shared > most_nodes_) shared = 0;
    size_ = shared == 0 ? count : size_ + count - shared;
    node_.resize(static_cast<size_t>(count));
    request_.resize(static_cast<size_t>(count) + 1);
    for (int64_t i = shared; i < count; ++i) {
      node_[static_cast<size_t>(i)] = static_cast<int32_t>(out.tokens.size());
      out.tokens.push_back(token(i));
      out.parents.push_back(i == 0 ? -1 : node_[static_cast<size_t>(i) - 1]);
    }
    for (int64_t i = std::max(length, shared); i <= count; ++i) {
      request_[static_cast<size_t>(i)] = static_cast<int64_t>(out.nodes.size());
      out.nodes.push_back(node_[static_cast<size_t>(i) - 1]);
      out.targets.push_back(token(i));
    }
    out.paths.insert(out.paths.end(), request_.begin() + length, request_.end());
    out.ends.push_back(static_cast<int64_t>(out.paths.size()));
  }

  const int64_t most_nodes_;
  const int32_t end_;
  int64_t size_ = 0;              // nodes of the trie that grows
  std::vector<int32_t> node_;     // of the tokens of the row before
  std::vector<int64_t> request_;  // for them, and for the end
};

}  // namespace

Tries make_tries(const Lists& lists, int64_t most_words, int64_t most_nodes, int32_t end) {
  Builder builder(most_nodes, end);
  builder.out.which.assign(static_cast<size_t>(lists.rows), -1);
  std::vector<Words> rows;
  int64_t row = 0, at = 0, prefix = 0;
  for (int64_t group = 0; group < lists.groups; ++group) {
    rows.clear();
    for (; row < lists.group_ends[group]; at = lists.ends[row++]) {
      if (lists.ends[row] - at <= most_words)
        rows.push_back({lists.words + at, lists.words + lists.ends[row], row});
    }
    std::sort(rows.begin(), rows.end());
    builder.add_group(lists.prefixes + prefix, lists.prefix_ends[group] - prefix, rows);
    prefix = lists.prefix_ends[group];
  }
  return std::move(builder.out);
}

}  // namespace lowbit
