// torch.ops.ds_serve.paged_attention: writes a step's keys and values into KV blocks, then attends.
//
// One call serves a ragged batch: prefill chunks and decode rows alike. Work is cut into items of
// (row, KV head, tile of queries), and rows of few queries also by spans of keys, whose partial results
// are merged (flash decoding), so that threads share one long row. The cuts depend on the row alone:
// a row's result is bit for bit the same in any batch and with any number of threads.
// Where v_offset is k_offset, values are the first columns of the keys, and v is asked for its shape alone.
// ds_serve/attention/cpu.py describes the blocks' layout; attention_kernels.h computes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "attention_kernels.h"

namespace ds_serve {
namespace {

constexpr int kTileRows = 96;       // (query, head) rows in a tile, at most
constexpr int kTileQueries = 64;    // queries in a tile, at most
constexpr int kSplitQueries = 16;   // rows of at most so many queries are cut by keys too
constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which one thread is faster

template <typename T>
struct Call {
  const T *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
  T* out;                                                     // [tokens][heads][v_dim]
  uint32_t* slab;
  int64_t block_words, k_base, v_base;  // words: of a block's row, and of the regions in it
  int heads, kv_heads, group, k_dim, v_dim, block_size;
  const int64_t* slots;
  const int32_t *query_start, *context_len, *tables;
  int64_t table_stride;
  float scale, softcap;
  int64_t window, chunk;
  const float* sinks;  // null for none
  const float* bias;   // [heads][bias_length] added to scores by the key's position; null for none
  int64_t bias_length;

  int k_words() const { return k_dim / kPerWord<T>; }
  int v_stride() const { return (v_dim + kSub - 1) / kSub * kSub; }
  int64_t k_line() const { return int64_t(kSub) * k_words(); }          // words of 16 tokens of one head
  int64_t v_line() const { return int64_t(kSub) / kPerWord<T> * v_dim; }
  bool v_in_k() const { return v_base == k_base; }  // values are the first columns of the keys
  int64_t value_words() const { return v_in_k() ? k_line() : v_line(); }  // of the line that holds them
  // Words of the lines in which a head keeps the tokens sub*16.. of a block.
  uint32_t* keys(int64_t block, int head, int sub) const {
    return slab + block * block_words + k_base + (int64_t(head) * (block_size / kSub) + sub) * k_line();
  }
  uint32_t* values(int64_t block, int head, int sub) const {
    return slab + block * block_words + v_base + (int64_t(head) * (block_size / kSub) + sub) * value_words();
  }
};

struct Item {
  int row, head;
  int query, queries;      // first query of the tile, within the row, and how many
  int64_t key_begin, key_end;
  int64_t partial;         // where its partial result goes, in floats; -1: it writes the output
  int64_t work;
};

struct Merge {  // items of one tile whose partial results follow each other
  int first_item, count;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Merge> merges;
  std::vector<int> order;  // items, largest first
  int64_t partial_floats = 0, work = 0;
  int max_rows = 0;
};

// A partial result: [rows][v_stride] sums, [rows] largest scores, [rows] sums of p.
int64_t partial_size(int rows, int v_stride) { return int64_t(rows) * (v_stride + 2); }

template <typename T>
int64_t first_visible(const Call<T>& c, int64_t position) {
  int64_t low = 0;
  if (c.window > 0) low = std::max(low, position - c.window + 1);
  if (c.chunk > 0) low = std::max(low, position / c.chunk * c.chunk);
  return low;
}

template <typename T>
void plan_tile(const Call<T>& c, Plan& plan, int row, int head, int query, int queries, bool split) {
  const int64_t start = c.context_len[row] - (c.query_start[row + 1] - c.query_start[row]);
  const int64_t low = first_visible(c, start + query), high = start + query + queries;
  const int rows = queries * c.group;
  const int64_t first = split ? low / kRange : 0, last = split ? (high - 1) / kRange : 0;
  plan.max_rows = std::max(plan.max_rows, rows);
  if (first < last) plan.merges.push_back({int(plan.items.size()), int(last - first + 1)});
  for (int64_t span = first; span <= last; span++) {
    Item item{row, head, query, queries, low, high, -1, 0};
    if (first < last) {
      item.key_begin = std::max(low, span * kRange);
      item.key_end = std::min(high, (span + 1) * kRange);
      item.partial = plan.partial_floats;
      plan.partial_floats += partial_size(rows, c.v_stride());
    }
    item.work = (item.key_end - item.key_begin) * rows * (c.k_dim + c.v_dim);
    plan.work += item.work;
    plan.items.push_back(item);
  }
}

template <typename T>
Plan make_plan(const Call<T>& c, int num_rows) {
  Plan plan;
  const int tile = std::clamp(kTileRows / c.group, 1, kTileQueries);
  for (int row = 0; row < num_rows; row++) {
    const int queries = c.query_start[row + 1] - c.query_start[row];
    for (int head = 0; head < c.kv_heads; head++)
      for (int query = 0; query < queries; query += tile)
        plan_tile(c, plan, row, head, query, std::min(tile, queries - query), queries <= kSplitQueries);
  }
  plan.order.resize(plan.items.size());
  for (size_t i = 0; i < plan.order.size(); i++) plan.order[i] = int(i);
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](int a, int b) { return plan.items[a].work > plan.items[b].work; });
  return plan;
}

// -- writing ------------------------------------------------------------------------------------

// Tokens first .. first+count-1, which lie one after another in one block. A block's first token clears
// the lines of its values: what a former owner left there is multiplied by probability 0, and must not be NaN.
template <typename T>
void write_run(const Call<T>& c, int64_t first, int count) {
  const int64_t block = c.slots[first] / c.block_size;
  const int begin = int(c.slots[first] % c.block_size);
  for (int head = 0; head < c.kv_heads; head++) {
    if (begin == 0 && count < c.block_size)
      std::memset(c.values(block, head, 0), 0, 4 * c.value_words() * (c.block_size / kSub));
    for (int i = 0; i < count; i++) {
      const int sub = (begin + i) / kSub, lane = (begin + i) % kSub;
      const T* k = c.k + (first + i) * c.k_token + head * c.k_head;
      uint32_t* k_line = c.keys(block, head, sub) + lane;
      for (int d = 0; d < c.k_words(); d++) std::memcpy(k_line + d * kSub, k + d * kPerWord<T>, 4);
      if (c.v_in_k()) continue;
      const T* v = c.v + (first + i) * c.v_token + head * c.v_head;
      uint32_t* v_line = c.values(block, head, sub) + lane / kPerWord<T> * c.v_dim;
      if (kPerWord<T> == 2 && lane % 2 == 1 && i > 0) continue;  // written with its neighbour
      if (kPerWord<T> == 2 && lane % 2 == 0 && i + 1 < count) {
        const T* next = v + c.v_token;
        for (int d = 0; d < c.v_dim; d++) v_line[d] = uint32_t(v[d]) | uint32_t(next[d]) << 16;
      } else {
        T* elements = reinterpret_cast<T*>(v_line) + lane % kPerWord<T>;
        for (int d = 0; d < c.v_dim; d++) elements[d * kPerWord<T>] = v[d];
      }
    }
  }
}

// The step's tokens as runs (first token, count) within one block each.
std::vector<std::pair<int64_t, int>> find_runs(const int64_t* slots, int64_t tokens, int block_size) {
  std::vector<std::pair<int64_t, int>> runs;
  for (int64_t t = 0; t < tokens; t++) {
    if (t > 0 && slots[t] == slots[t - 1] + 1 && slots[t] % block_size != 0) {
      runs.back().second++;
    } else {
      runs.emplace_back(t, 1);
    }
  }
  return runs;
}

// -- attending ----------------------------------------------------------------------------------

// One thread's memory, for tiles of up to max_rows rows. Kept between calls.
struct Scratch {
  std::vector<uint32_t> words;
  std::vector<int64_t> bounds;
  std::vector<const float*> biases;

  template <typename T>
  Tile tile(const Call<T>& c, int max_rows) {
    const size_t rows = max_rows, q = rows * c.k_words(), out = rows * c.v_stride();
    const size_t values = c.v_in_k() ? kRange / kSub * c.v_line() : 0;
    const size_t need = q + out + rows * (1 + kSub) + 2 * kMicroRows * kRange + values + kSub;
    if (words.size() < need) words.resize(need);
    if (bounds.size() < 2 * rows) bounds.resize(2 * rows);
    if (biases.size() < rows) biases.resize(rows);
    const size_t skew = (64 - reinterpret_cast<uintptr_t>(words.data()) % 64) % 64 / 4;
    uint32_t* scores = words.data() + skew;
    uint32_t* probs = scores + kMicroRows * kRange;
    uint32_t* v = probs + kMicroRows * kRange;
    float* sums = reinterpret_cast<float*>(v + values);
    float* lane_sums = sums + out;
    float* top = lane_sums + rows * kSub;
    return Tile{0, c.k_words(), c.v_dim, c.v_stride(), reinterpret_cast<uint32_t*>(top + rows), sums, top,
                lane_sums, bounds.data(), bounds.data() + rows, c.bias ? biases.data() : nullptr, c.bias_length,
                0.0f, 0.0f, reinterpret_cast<float*>(scores), probs, v};
  }
};

template <typename T>
void load_queries(const Call<T>& c, const Item& item, Tile& tile) {
  const int64_t token = c.query_start[item.row] + item.query;
  const int64_t start = c.context_len[item.row] - (c.query_start[item.row + 1] - c.query_start[item.row]);
  tile.rows = item.queries * c.group;
  tile.scale = c.softcap > 0 ? c.scale / c.softcap : c.scale * vec::kLog2e;
  tile.cap = c.softcap > 0 ? c.softcap * vec::kLog2e : 0.0f;
  auto* q = const_cast<uint32_t*>(tile.q);
  auto *low = const_cast<int64_t*>(tile.low), *high = const_cast<int64_t*>(tile.high);
  for (int row = 0; row < tile.rows; row++) {
    const int query = row / c.group, head = item.head * c.group + row % c.group;
    const int64_t position = start + item.query + query;
    std::memcpy(q + int64_t(row) * tile.k_words, c.q + (token + query) * c.q_token + head * c.q_head,
                sizeof(T) * c.k_dim);
    low[row] = std::max(item.key_begin, first_visible(c, position));
    high[row] = std::min(item.key_end - 1, position);
    tile.top[row] = kNoScore;
    if (c.bias) tile.bias[row] = c.bias + head * c.bias_length;
  }
  std::fill_n(tile.lane_sums, tile.rows * kSub, 0.0f);
  std::fill_n(tile.out, int64_t(tile.rows) * tile.v_stride, 0.0f);
}

template <typename T>
void load_range(const Call<T>& c, const Item& item, const Tile& tile, int64_t first_key, Range& range) {
  range.first_key = first_key;
  const int32_t* table = c.tables + item.row * c.table_stride;
  const int64_t begin = std::max(item.key_begin, first_key) / kSub;
  const int64_t end = (std::min(item.key_end, first_key + kRange) + kSub - 1) / kSub;
  for (int64_t line = begin; line < end; line++) {
    const int64_t block = table[line * kSub / c.block_size];
    const int sub = int(line % (c.block_size / kSub));
    const int64_t i = line - first_key / kSub;
    range.k[i] = c.keys(block, item.head, sub);
    range.v[i] = c.v_in_k() ? tile.values + i * c.v_line() : c.values(block, item.head, sub);
    if (c.v_in_k()) values_of_keys<T>(range.k[i], c.v_dim, tile.values + i * c.v_line());
  }
  const auto past = range.k + (end - first_key / kSub);
  std::fill(past, std::end(range.k), past[-1]);
}

// Divides a row's sums by its softmax denominator and writes it where the output wants it.
template <typename T>
void finish_row(const Call<T>& c, const Item& item, int row, const float* sums, float top, float total) {
  const int head = item.head * c.group + row % c.group;
  const int64_t token = c.query_start[item.row] + item.query + row / c.group;
  if (c.sinks) total += std::exp2(c.sinks[head] * vec::kLog2e - top);
  const vec::Vec16 factor = vec::set1(1.0f / total);
  T* out = c.out + (token * c.heads + head) * c.v_dim;
  for (int d = 0; d < c.v_dim; d += kSub) vec::store(out + d, vec::load(sums + d) * factor, c.v_dim - d);
}

template <typename T>
void run_item(const Call<T>& c, const Item& item, Tile& tile, float* partials) {
  load_queries(c, item, tile);
  Range range;
  for (int64_t key = item.key_begin / kRange * kRange; key < item.key_end; key += kRange) {
    load_range(c, item, tile, key, range);
    attend_range<T>(tile, range);
  }
  float* partial = item.partial < 0 ? nullptr : partials + item.partial;
  for (int row = 0; row < tile.rows; row++) {
    const float total = vec::reduce_add(vec::load(tile.lane_sums + row * kSub));
    const float* sums = tile.out + int64_t(row) * tile.v_stride;
    if (!partial) {
      finish_row(c, item, row, sums, tile.top[row], total);
      continue;
    }
    std::memcpy(partial + int64_t(row) * tile.v_stride, sums, 4 * tile.v_stride);
    partial[int64_t(tile.rows) * tile.v_stride + row] = tile.top[row];
    partial[int64_t(tile.rows) * (tile.v_stride + 1) + row] = total;
  }
}

template <typename T>
void run_merge(const Call<T>& c, const Plan& plan, const Merge& merge, Tile& tile, const float* partials) {
  const Item& item = plan.items[merge.first_item];
  const int rows = item.queries * c.group, stride = c.v_stride();
  const float* first = partials + item.partial;
  for (int row = 0; row < rows; row++) {
    float top = kNoScore, total = 0.0f;
    for (int i = 0; i < merge.count; i++)
      top = std::max(top, first[i * partial_size(rows, stride) + int64_t(rows) * stride + row]);
    std::fill_n(tile.out, stride, 0.0f);
    for (int i = 0; i < merge.count; i++) {
      const float* part = first + i * partial_size(rows, stride);
      const float factor = std::exp2(part[int64_t(rows) * stride + row] - top);
      total += factor * part[int64_t(rows) * (stride + 1) + row];
      const float* sums = part + int64_t(row) * stride;
      for (int d = 0; d < stride; d++) tile.out[d] += factor * sums[d];
    }
    finish_row(c, item, row, tile.out, top, total);
  }
}

template <typename T>
void run(const Call<T>& c, int64_t tokens, int num_rows) {
  const auto runs = find_runs(c.slots, tokens, c.block_size);
  const Plan plan = make_plan(c, num_rows);
  const std::unique_ptr<float[]> partials(new float[plan.partial_floats]);
  const int threads = plan.work < kSerialWork ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
    Tile tile = scratch.tile(c, plan.max_rows);
#pragma omp for schedule(static)
    for (size_t i = 0; i < runs.size(); i++) write_run(c, runs[i].first, runs[i].second);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < plan.order.size(); i++)
      run_item(c, plan.items[plan.order[i]], tile, partials.get());
#pragma omp for schedule(static)
    for (size_t i = 0; i < plan.merges.size(); i++)
      run_merge(c, plan, plan.merges[i], tile, partials.get());
  }
}

// -- the op -------------------------------------------------------------------------------------

void check_rows(const at::Tensor& slots, const at::Tensor& query_start, const at::Tensor& context_len,
                const at::Tensor& tables, int64_t tokens, int64_t block_size, int64_t num_blocks) {
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.size(0) == tokens &&
                        slots.is_contiguous(), "slot_mapping: must be contiguous int64[", tokens, "]");
  for (const auto& [name, x] : {std::pair<const char*, const at::Tensor&>{"query_start", query_start},
                                {"context_len", context_len}, {"block_tables", tables}})
    TORCH_CHECK_VALUE(x.scalar_type() == at::kInt && x.is_contiguous(), name, ": must be contiguous int32");
  const int64_t rows = context_len.numel();
  TORCH_CHECK_VALUE(query_start.numel() == rows + 1, "query_start: must have one entry more than context_len");
  TORCH_CHECK_VALUE(tables.dim() == 2 && tables.size(0) == rows, "block_tables: must be [", rows, ", blocks]");
  for (int64_t i = 0; i < tokens; i++)
    TORCH_CHECK_VALUE(uint64_t(slots.const_data_ptr<int64_t>()[i]) < uint64_t(num_blocks * block_size),
                      "slot_mapping: token ", i, " lies outside of the slab");
  const int32_t* start = query_start.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(start[0] == 0 && start[rows] == tokens, "query_start: must run from 0 to ", tokens);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t length = context_len.const_data_ptr<int32_t>()[r], queries = start[r + 1] - start[r];
    TORCH_CHECK_VALUE(queries >= 0 && length >= queries && length <= tables.size(1) * block_size,
                      "context_len: row ", r, " has ", length, " for ", queries, " queries and ",
                      tables.size(1), " blocks");
    const int32_t* table = tables.const_data_ptr<int32_t>() + r * tables.size(1);
    for (int64_t b = 0; queries > 0 && b * block_size < length; b++)
      TORCH_CHECK_VALUE(table[b] >= 0 && table[b] < num_blocks, "block_tables: row ", r, " names block ", table[b]);
  }
}

void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slab,
                   int64_t k_offset, int64_t v_offset, int64_t block_size) {
  const auto dtype = slab.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kBFloat16 || dtype == at::kFloat, "slab: must be bfloat16 or float32");
  for (const auto& [name, x] : {std::pair<const char*, const at::Tensor&>{"q", q}, {"k", k}, {"v", v}})
    TORCH_CHECK_VALUE(x.dim() == 3 && x.scalar_type() == dtype && x.size(0) == q.size(0) &&
                          (x.stride(2) == 1 || x.size(2) == 1),
                      name, ": must be [tokens, heads, dim] of the slab's dtype, its last dimension contiguous");
  TORCH_CHECK_VALUE(k.size(2) == q.size(2), "k: head size ", k.size(2), " is not q's ", q.size(2));
  TORCH_CHECK_VALUE(k.size(1) == v.size(1) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "k, v: ", k.size(1), " and ", v.size(1), " heads for ", q.size(1), " query heads");
  TORCH_CHECK_VALUE(dtype == at::kFloat || k.size(2) % 2 == 0, "k: an odd head size needs float32");
  TORCH_CHECK_VALUE(block_size > 0 && block_size % kSub == 0, "block_size: must be a multiple of 16");
  TORCH_CHECK_VALUE(slab.dim() == 2 && slab.is_contiguous(), "slab: must be contiguous [blocks, elements]");
  const int64_t align = dtype == at::kFloat ? 1 : 2;
  TORCH_CHECK_VALUE(k_offset % align == 0 && v_offset % align == 0 && slab.size(1) % align == 0,
                    "slab: its regions must begin at multiples of 4 bytes");
  TORCH_CHECK_VALUE(k_offset != v_offset || v.size(2) <= k.size(2), "v: has ", v.size(2),
                    " columns, and the keys that hold them ", k.size(2));
  TORCH_CHECK_VALUE(k_offset >= 0 && k_offset + block_size * k.size(1) * k.size(2) <= slab.size(1) &&
                        v_offset >= 0 && v_offset + block_size * v.size(1) * v.size(2) <= slab.size(1),
                    "slab: the layer's regions do not lie within a block's row");
}

void check_bias(const at::Tensor& bias, const at::Tensor& context_len, int64_t heads, double softcap) {
  TORCH_CHECK_VALUE(bias.dim() == 2 && bias.scalar_type() == at::kFloat && bias.is_contiguous() &&
                        bias.size(0) == heads, "key_bias: must be contiguous float32[", heads, ", keys]");
  TORCH_CHECK_VALUE(softcap == 0, "key_bias: not together with softcap");
  const int32_t* length = context_len.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < context_len.numel(); r++)
    TORCH_CHECK_VALUE(length[r] <= bias.size(1), "key_bias: is given for ", bias.size(1), " keys, row ", r,
                      " has ", length[r]);
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& slab,
                           int64_t k_offset, int64_t v_offset, int64_t block_size, const at::Tensor& slot_mapping,
                           const at::Tensor& query_start, const at::Tensor& context_len,
                           const at::Tensor& block_tables, double scale, int64_t window, int64_t chunk,
                           double softcap, const std::optional<at::Tensor>& sinks,
                           const std::optional<at::Tensor>& key_bias) {
  check_tensors(q, k, v, slab, k_offset, v_offset, block_size);
  check_rows(slot_mapping, query_start, context_len, block_tables, q.size(0), block_size, slab.size(0));
  TORCH_CHECK_VALUE(window >= 0 && chunk >= 0 && softcap >= 0, "window, chunk, softcap: must be at least 0");
  at::Tensor sink_values;
  if (sinks) {
    TORCH_CHECK_VALUE(sinks->numel() == q.size(1), "sinks: must have one value a head");
    sink_values = sinks->to(at::kFloat).contiguous();
  }
  if (key_bias) check_bias(*key_bias, context_len, q.size(1), softcap);
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  auto call = [&]<typename T>(T) {
    auto at_type = [](const at::Tensor& x) { return static_cast<T*>(x.data_ptr()); };
    const Call<T> c{
        at_type(q), at_type(k), at_type(v), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), at_type(out), static_cast<uint32_t*>(slab.data_ptr()), slab.size(1) / kPerWord<T>,
        k_offset / kPerWord<T>, v_offset / kPerWord<T>, int(q.size(1)), int(k.size(1)),
        int(q.size(1) / k.size(1)), int(k.size(2)), int(v.size(2)), int(block_size),
        slot_mapping.const_data_ptr<int64_t>(), query_start.const_data_ptr<int32_t>(),
        context_len.const_data_ptr<int32_t>(), block_tables.const_data_ptr<int32_t>(), block_tables.size(1),
        float(scale), float(softcap), window, chunk, sinks ? sink_values.const_data_ptr<float>() : nullptr,
        key_bias ? key_bias->const_data_ptr<float>() : nullptr, key_bias ? key_bias->size(1) : 0};
    run(c, q.size(0), int(context_len.numel()));
  };
  if (slab.scalar_type() == at::kFloat) {
    call(float{});
  } else {
    call(vec::bf16{});
  }
  return out;
}

namespace {

at::Tensor paged_attention_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor& v, at::Tensor&, int64_t,
                                int64_t, int64_t, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, double, int64_t, int64_t, double,
                                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&) {
  return at::empty_symint({q.sym_size(0), q.sym_size(1), v.sym_size(2)}, q.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ds_serve, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) slab, int k_offset, int v_offset, "
      "int block_size, Tensor slot_mapping, Tensor query_start, Tensor context_len, Tensor block_tables, "
      "float scale, int window, int chunk, float softcap, Tensor? sinks, "
      "Tensor? key_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(ds_serve, CPU, m) { m.impl("paged_attention", paged_attention); }
TORCH_LIBRARY_IMPL(ds_serve, Meta, m) { m.impl("paged_attention", paged_attention_meta); }

}  // namespace ds_serve
