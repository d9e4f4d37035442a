// The ops of a fused Llama-like decoder layer on CPU, bf16: norm + QKV + RoPE, output projection + residual,
// norm + SwiGLU + residual, and the packed linear, embedding and norm around the layers.
//
// Rounds to bf16 where transformers' modules do, so that logits stay close to theirs. Attention itself is
// another op (paged_attention.cpp); collectives between shards belong to the caller. Called from
// ds_serve/model/fused_cpu.py. Without AVX512-BF16 at compile time only has_avx512_bf16() -> false is there.
#include <malloc.h>
#include <omp.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <ATen/ATen.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "gemm_bf16.h"

namespace ds_serve {

static bool has_avx512_bf16() {
#ifdef __AVX512BF16__
  return true;
#else
  return false;
#endif
}

#ifdef __AVX512BF16__
using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

constexpr int64_t MLP_ROWS = 384;  // rows of one pass through the MLP: bounds its scratch memory

static bf16* ptr(const Tensor& t) { return (bf16*)t.data_ptr(); }
static const bf16* ptr(OptTensor t) { return t.has_value() ? (const bf16*)t->data_ptr() : nullptr; }

// The packed weights that a caller says come next, or null.
static const Tensor* given(OptTensor next) {
  TORCH_CHECK_VALUE(!next.has_value() || (next->dim() == 4 && next->is_contiguous()), "next: must be packed weights");
  return next.has_value() ? &*next : nullptr;
}

static void check_bf16(const Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == at::kBFloat16 && t.is_contiguous() && t.dim() == dim,
                    name, ": must be a contiguous bfloat16 CPU tensor of ", dim, " dimensions, got ",
                    t.scalar_type(), " ", t.sizes());
}

// Leading dimensions count as rows: [..., K] is [M, K].
static int64_t check_rows(const Tensor& t, const char* name, int64_t k) {
  check_bf16(t, name, t.dim());
  TORCH_CHECK_VALUE(t.dim() >= 1 && k > 0 && t.numel() % k == 0, name, ": must have rows of ", k, " elements, got ",
                    t.sizes());
  return t.numel() / k;
}

static std::vector<int64_t> with_last(const Tensor& t, int64_t n) {
  auto shape = t.sizes().vec();
  shape.back() = n;
  return shape;
}

static void check_vector(OptTensor t, const char* name, int64_t n) {
  if (!t.has_value()) return;
  check_bf16(*t, name, 1);
  TORCH_CHECK_VALUE(t->size(0) == n, name, ": must have ", n, " elements, got ", t->size(0));
}

static void check_packed(const Tensor& w, const char* name, int64_t n, int64_t k) {
  check_bf16(w, name, 4);
  TORCH_CHECK_VALUE(w.size(0) == ceil_div(n, PANEL) && w.size(1) == ceil_div(k, 2) && w.size(2) == PANEL &&
                        w.size(3) == 2,
                    name, ": must be packed for ", n, " outputs of ", k, " inputs, got ", w.sizes());
}

// Scratch of the calling thread, kept between calls so that no step pays for fresh pages.
static bf16* scratch(int slot, int64_t n) {
  static thread_local std::vector<bf16> buffers[2];
  auto& b = buffers[slot];
  if ((int64_t)b.size() < n + 32) b.resize(n + 32);
  return (bf16*)(((uintptr_t)b.data() + 63) & ~(uintptr_t)63);
}

// Row stride of a scratch matrix: a multiple of 2 KiB would put a tile's rows into the same few cache sets.
static int64_t padded_stride(int64_t k) {
  int64_t even = ceil_div(k, 32) * 32;
  return even % 1024 == 0 ? even + 32 : even;
}

// Memory of packed weights: chunks of huge pages (where the system grants them), because streaming weights
// through pages of 4 KiB costs 10 to 20 % in address translation. A chunk goes when its last tensor does.
struct Chunk {
  static constexpr size_t HUGE = 2 << 20, SIZE = 32 << 20;
  char *map, *at, *end;
  size_t length;

  explicit Chunk(size_t bytes) : length((std::max(bytes, SIZE) + 2 * HUGE - 1) / HUGE * HUGE) {
    malloc_trim(0);  // gives back what the originals of earlier packed weights left in the heap
    map = (char*)mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, map != MAP_FAILED, "packed weights: no ", length, " bytes of memory");
    at = (char*)(((uintptr_t)map + HUGE - 1) / HUGE * HUGE);
    end = map + length;
    madvise(at, end - at, MADV_HUGEPAGE);
  }
  ~Chunk() { munmap(map, length); }
};

// Zeros, 64-byte aligned.
static Tensor weight_memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> current;
  size_t bytes = (c10::multiply_integers(sizes) * sizeof(bf16) + 63) / 64 * 64;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Chunk> chunk = current.lock();
  if (!chunk || (size_t)(chunk->end - chunk->at) < bytes) current = chunk = std::make_shared<Chunk>(bytes);
  char* memory = chunk->at;
  chunk->at += bytes;
  return at::from_blob(memory, sizes, [chunk](void*) {}, options);
}

// ---- epilogues: what becomes of a row's 32 sums of one panel ----

struct Store {  // bf16(sum + bias), then bf16(residual + that)
  bf16* out;
  int64_t ldo, n;
  const bf16 *bias, *residual;

  void half(int64_t row, int64_t col, __m512 v) const {
    __mmask16 m = mask_upto(n - col);
    if (bias) v = _mm512_add_ps(v, load_bf16(bias + col, m));
    if (residual) v = _mm512_add_ps(rounded(v), load_bf16(residual + row * ldo + col, m));
    store_bf16(out + row * ldo + col, v, m);
  }
  void operator()(int64_t row, int64_t p, __m512 a, __m512 b) const {
    half(row, p * PANEL, a);
    half(row, p * PANEL + 16, b);
  }
};

struct GatedSilu {  // panels hold 16 gate columns, then the 16 up columns they go with
  bf16* out;
  int64_t ldo;
  const bf16* bias;  // interleaved as the columns are

  void operator()(int64_t row, int64_t p, __m512 gate, __m512 up) const {
    if (bias) {
      gate = _mm512_add_ps(gate, load_bf16(bias + p * PANEL));
      up = _mm512_add_ps(up, load_bf16(bias + p * PANEL + 16));
    }
    __m512 v = _mm512_mul_ps(rounded(silu_ps(rounded(gate))), rounded(up));
    _mm256_storeu_si256((__m256i*)(out + row * ldo + p * 16), narrow(v));
  }
};

// Norm and product of this thread's share, a chunk of rows at a time. Each thread normalises the rows it reads
// itself (about 1 % of its work), which spares a barrier. norm may be null. next are the packed weights of the
// product that comes after this one, or null: their first panels are fetched at the end.
template <class Epilogue>
static void norm_multiply(const bf16* x, int64_t ldx, int64_t m, int64_t k, const bf16* norm, float eps,
                          const Tensor& w, const Tensor* next, const Epilogue& epilogue) {
  int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  Share s = share_of(thread, threads, m, w.size(0));
  const char* after = nullptr;
  if (next) after = (const char*)ptr(*next) + share_of(thread, threads, m, next->size(0)).p0 * next->stride(0) * 2;
  int64_t ldn = padded_stride(k);
  for (int64_t row = s.m0; row < s.m1; row += CHUNK) {
    int64_t rows = std::min(CHUNK, s.m1 - row);
    const bf16* in = x + row * ldx;
    if (norm) {
      bf16* normed = scratch(0, CHUNK * ldn);
      for (int64_t r = 0; r < rows; ++r) rms_norm_row(in + r * ldx, norm, normed + r * ldn, k, eps);
      in = normed;
    }
    multiply(in, norm ? ldn : ldx, rows, row, ptr(w), w.size(1), s.p0, s.p1, after, epilogue);
  }
}

// ---- ops ----

// W[N, K] to panels [ceil(N/32), ceil(K/2), 32, 2].
static Tensor pack_weight(const Tensor& w) {
  check_bf16(w, "weight", 2);
  int64_t n = w.size(0), k = w.size(1), panels = ceil_div(n, PANEL), pairs = ceil_div(k, 2);
  Tensor packed = weight_memory({panels, pairs, PANEL, 2}, w.options());
  const bf16* from = ptr(w);
  bf16* to = ptr(packed);
#pragma omp parallel for
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t c = p * PANEL; c < std::min(n, (p + 1) * PANEL); ++c)
      for (int64_t i = 0; i < k; ++i) to[((p * pairs + i / 2) * PANEL + c % PANEL) * 2 + i % 2] = from[c * k + i];
  return packed;
}

// x[..., K] * W^T + bias -> [..., N], W packed.
static Tensor linear_packed(const Tensor& x_in, const Tensor& w, int64_t n, OptTensor bias) {
  int64_t k = x_in.size(-1), m = check_rows(x_in, "x", k);
  check_packed(w, "weight", n, k);
  check_vector(bias, "bias", n);
  Tensor x = k % 2 ? at::constant_pad_nd(x_in, {0, 1}) : x_in;
  Tensor out = at::empty(with_last(x, n), x.options());
  Store store{ptr(out), n, n, ptr(bias), nullptr};
#pragma omp parallel
  norm_multiply(ptr(x), x.size(-1), m, k, nullptr, 0, w, nullptr, store);
  return out;
}

// Rows of a packed [N, K] table: the tied embedding, without a second copy. ids: int64, any shape -> [*ids, K].
static Tensor embedding_packed(const Tensor& ids_in, const Tensor& w, int64_t n, int64_t k) {
  check_packed(w, "weight", n, k);
  TORCH_CHECK_VALUE(k % 2 == 0, "k: must be even, got ", k);
  Tensor ids = ids_in.to(at::kLong).contiguous();
  auto shape = ids.sizes().vec();
  shape.push_back(k);
  Tensor out = at::empty(shape, w.options());
  const int64_t *id = ids.const_data_ptr<int64_t>(), count = ids.numel();
  for (int64_t t = 0; t < count; ++t)
    TORCH_CHECK_INDEX(id[t] >= 0 && id[t] < n, "ids: must be between 0 and ", n - 1, ", got ", id[t]);
  const int32_t* table = (const int32_t*)ptr(w);
  int32_t* to = (int32_t*)ptr(out);
#pragma omp parallel for if (count > 4)
  for (int64_t t = 0; t < count; ++t) {
    const int32_t* column = table + (id[t] / PANEL) * (k / 2) * PANEL + id[t] % PANEL;
    for (int64_t i = 0; i < k / 2; ++i) to[t * (k / 2) + i] = column[i * PANEL];
  }
  return out;
}

// RMSNorm over the last dimension of x[..., K].
static Tensor rms_norm(const Tensor& x, const Tensor& w, double eps) {
  int64_t k = x.size(-1), m = check_rows(x, "x", k);
  check_vector(w, "weight", k);
  Tensor out = at::empty_like(x);
#pragma omp parallel for if (m * k > 65536)
  for (int64_t r = 0; r < m; ++r) rms_norm_row(ptr(x) + r * k, ptr(w), ptr(out) + r * k, k, (float)eps);
  return out;
}

// One head in place: x * cos + rotate_half(x) * sin, each step rounded to bf16.
static void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t d) {
  for (int64_t i = 0; i < d / 2; i += 16) {
    bf16 *lo = x + i, *hi = x + d / 2 + i;
    __m512 a = load_bf16(lo), b = load_bf16(hi);
    __m512 ac = rounded(_mm512_mul_ps(a, load_bf16(cos + i)));
    __m512 bs = rounded(_mm512_mul_ps(b, load_bf16(sin + i)));
    __m512 bc = rounded(_mm512_mul_ps(b, load_bf16(cos + d / 2 + i)));
    __m512 as = rounded(_mm512_mul_ps(a, load_bf16(sin + d / 2 + i)));
    _mm256_storeu_si256((__m256i*)lo, narrow(_mm512_sub_ps(ac, bs)));
    _mm256_storeu_si256((__m256i*)hi, narrow(_mm512_add_ps(bc, as)));
  }
}

// RMSNorm, QKV projection, per-head q/k norm where given, RoPE. x[.., T, K], cos and sin [.., T, D] ->
// q[T, H, D], k[T, Hk, D], v[T, Hk, D]: views of one [T, (H + 2 Hk) * D].
static std::tuple<Tensor, Tensor, Tensor> attention_in(const Tensor& x, const Tensor& norm, double eps,
                                                       const Tensor& wqkv, OptTensor bias, OptTensor q_norm,
                                                       OptTensor k_norm, const Tensor& cos_in, const Tensor& sin_in,
                                                       int64_t heads, int64_t kv_heads, int64_t d,
                                                       OptTensor next) {
  int64_t k = x.size(-1), m = check_rows(x, "x", k), n = (heads + 2 * kv_heads) * d;
  check_vector(norm, "norm", k);
  check_packed(wqkv, "wqkv", n, k);
  check_vector(bias, "bias", n);
  check_vector(q_norm, "q_norm", d);
  check_vector(k_norm, "k_norm", d);
  Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
  for (auto& [t, name] : {std::pair<const Tensor&, const char*>{cos, "cos"}, {sin, "sin"}}) {
    TORCH_CHECK_VALUE(check_rows(t, name, d) == m && t.size(-1) == d, name, ": must be [", m, ", ", d, "], got ",
                      t.sizes());
  }
  TORCH_CHECK_VALUE(k % 2 == 0 && d % 32 == 0, "x, head_dim: must be multiples of 2 and 32, got ", k, ", ", d);
  Tensor out = at::empty({m, n}, x.options());
  bf16* qkv = ptr(out);
  Store store{qkv, n, n, ptr(bias), nullptr};
  const Tensor* then = given(next);
  const bf16 *qn = ptr(q_norm), *kn = ptr(k_norm);
#pragma omp parallel
  {
    norm_multiply(ptr(x), k, m, k, ptr(norm), (float)eps, wqkv, then, store);
#pragma omp barrier
    int64_t items = m * (heads + kv_heads);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      int64_t row = i / (heads + kv_heads), head = i % (heads + kv_heads);
      bf16* at = qkv + row * n + head * d;
      const bf16* weight = head < heads ? qn : kn;
      if (weight) rms_norm_row(at, weight, at, d, (float)eps);
      rotate(at, ptr(cos) + row * d, ptr(sin) + row * d, d);
    }
  }
  auto part = [&](int64_t from, int64_t h) { return at::as_strided(out, {m, h, d}, {n, d, 1}, from * d); };
  return {part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)};
}

// attended[T, H, D] as [T, K] * W^T (+ bias) (+ residual) -> [T, N], or residual's shape: attention's output.
static Tensor projection(const Tensor& x_in, const Tensor& w, int64_t n, OptTensor bias, OptTensor residual,
                         OptTensor next) {
  Tensor x = x_in.contiguous();
  check_bf16(x, "x", 3);
  int64_t m = x.size(0), k = x.size(1) * x.size(2);
  check_packed(w, "weight", n, k);
  check_vector(bias, "bias", n);
  TORCH_CHECK_VALUE(k % 2 == 0, "x: must have an even number of columns, got ", k);
  if (residual.has_value())
    TORCH_CHECK_VALUE(check_rows(*residual, "residual", n) == m, "residual: must have ", m, " rows of ", n, ", got ",
                      residual->sizes());
  Tensor out = residual.has_value() ? at::empty_like(*residual) : at::empty({m, n}, x.options());
  Store store{ptr(out), n, n, ptr(bias), ptr(residual)};
  const Tensor* then = given(next);
#pragma omp parallel
  norm_multiply(ptr(x), k, m, k, nullptr, 0, w, then, store);
  return out;
}

// RMSNorm, gate and up, SiLU(gate) * up, down (+ x as residual). x[..., K] -> the same. wgu's rows alternate
// 16 of gate with 16 of up, as bias_gu's elements do; wdown takes `inner` inputs.
static Tensor mlp(const Tensor& x, const Tensor& norm, double eps, const Tensor& wgu, OptTensor bias_gu,
                  const Tensor& wdown, OptTensor bias_down, int64_t inner, bool residual,
                  OptTensor next) {
  int64_t k = x.size(-1), m = check_rows(x, "x", k);
  check_vector(norm, "norm", k);
  TORCH_CHECK_VALUE(k % 2 == 0 && inner % 16 == 0, "x, inner: must be multiples of 2 and 16, got ", k, ", ", inner);
  check_packed(wgu, "wgu", 2 * inner, k);
  check_packed(wdown, "wdown", k, inner);
  check_vector(bias_gu, "bias_gu", 2 * inner);
  check_vector(bias_down, "bias_down", k);
  Tensor out = at::empty_like(x);
  int64_t ld = padded_stride(inner);
  bf16* product = scratch(1, std::min(m, MLP_ROWS) * ld);
  GatedSilu gated{product, ld, ptr(bias_gu)};
  const Tensor* then = given(next);
#pragma omp parallel
  for (int64_t row = 0; row < m; row += MLP_ROWS) {
    int64_t rows = std::min(MLP_ROWS, m - row);
    const bf16* in = ptr(x) + row * k;
    Store store{ptr(out) + row * k, k, k, ptr(bias_down), residual ? in : nullptr};
    norm_multiply(in, k, rows, k, ptr(norm), (float)eps, wgu, &wdown, gated);
#pragma omp barrier
    norm_multiply(product, ld, rows, inner, nullptr, 0, wdown, row + rows < m ? &wgu : then, store);
#pragma omp barrier
  }
  return out;
}
#endif  // __AVX512BF16__

}  // namespace ds_serve

TORCH_LIBRARY_FRAGMENT(ds_serve, m) {
  m.def("has_avx512_bf16() -> bool", &ds_serve::has_avx512_bf16);
#ifdef __AVX512BF16__
  m.def("pack_weight(Tensor weight) -> Tensor", &ds_serve::pack_weight);
  m.def("linear_packed(Tensor x, Tensor weight, int n, Tensor? bias) -> Tensor", &ds_serve::linear_packed);
  m.def("embedding_packed(Tensor ids, Tensor weight, int n, int k) -> Tensor", &ds_serve::embedding_packed);
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &ds_serve::rms_norm);
  m.def("attention_in(Tensor x, Tensor norm, float eps, Tensor wqkv, Tensor? bias, Tensor? q_norm, Tensor? k_norm, "
        "Tensor cos, Tensor sin, int heads, int kv_heads, int head_dim, "
        "Tensor? next) -> (Tensor, Tensor, Tensor)",
        &ds_serve::attention_in);
  m.def("projection(Tensor x, Tensor weight, int n, Tensor? bias, Tensor? residual, Tensor? next) -> Tensor",
        &ds_serve::projection);
  m.def("mlp(Tensor x, Tensor norm, float eps, Tensor wgu, Tensor? bias_gu, Tensor wdown, Tensor? bias_down, "
        "int inner, bool residual, Tensor? next) -> Tensor", &ds_serve::mlp);
#endif
}
