// What the ops of every device share: tensors, checked.
//
// Whatever could make the core read or write out of bounds is refused here. What a user gets wrong is told by the Python
// layer first; these checks are for those who call torch.ops.oplora directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../core/oplora_core.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---- one name for the float and the double function of the core ----

template <class T> struct core;
#define CORE_OF(type, suffix) \
    template <> struct core<type> { \
        using exact = oplora_exact_##suffix; \
        using lean = oplora_lean_##suffix; \
        using rate = oplora_rate_##suffix; \
        using moment = oplora_moment_##suffix; \
        using factor = oplora_factor_##suffix; \
        static constexpr ScalarType dtype = suffix##_dtype; \
        static constexpr auto generate = oplora_generate_##suffix; \
        static constexpr auto generate_backward = oplora_generate_backward_##suffix; \
        static constexpr auto exact_workspace_bytes = oplora_exact_workspace_bytes_##suffix; \
        static constexpr auto exact_measure = oplora_exact_measure_##suffix; \
        static constexpr auto exact_finish = oplora_exact_finish_##suffix; \
        static constexpr auto exact_step = oplora_exact_step_##suffix; \
        static constexpr auto exact_generate = oplora_exact_generate_##suffix; \
        static constexpr ScalarType moment_dtype = suffix##_moment_dtype; \
        static constexpr auto lean_start = oplora_lean_start_##suffix; \
        static constexpr auto lean_workspace_bytes = oplora_lean_workspace_bytes_##suffix; \
        static constexpr auto lean_measure = oplora_lean_measure_##suffix; \
        static constexpr auto lean_step = oplora_lean_step_##suffix; \
        static constexpr auto lean_reduce = oplora_lean_reduce_##suffix; \
        static constexpr auto lean_finish = oplora_lean_finish_##suffix; \
        static constexpr auto rate_workspace_bytes = oplora_rate_workspace_bytes_##suffix; \
        static constexpr auto rate_measure = oplora_rate_measure_##suffix; \
        static constexpr auto rate_step = oplora_rate_step_##suffix; \
    }
constexpr ScalarType f32_dtype = ScalarType::Float, f64_dtype = ScalarType::Double;
constexpr ScalarType f32_moment_dtype = ScalarType::BFloat16, f64_moment_dtype = ScalarType::Double;
CORE_OF(float, f32);
CORE_OF(double, f64);

// Calls f(T{}) for the dtype of t.
template <class F> auto for_dtype(const char *op, const Tensor &t, F f) {
    if (t.scalar_type() == ScalarType::Double) return f(double{});
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "oplora::", op, ": expected float32 or float64 tensors");
    return f(float{});
}

inline void check_core(const char *op, oplora_status status) {
    STD_TORCH_CHECK(status == OPLORA_OK, "oplora::", op, ": ", oplora_strerror(status));
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};

inline std::unique_ptr<void, Free> workspace(const char *op, int64_t bytes) {
    STD_TORCH_CHECK(bytes >= 0, "oplora::", op, ": sizes that do not add up, or pass 2^63");
    std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) & ~size_t{63}));
    STD_TORCH_CHECK(memory, "oplora::", op, ": out of memory, for ", bytes, " bytes of scratch");
    return memory;
}

// Where an op's tensors lie: on the CPU, or on one CUDA device.
struct Place {
    bool on_cuda = false;
    int32_t device = 0;

    bool holds(const Tensor &t) const { return on_cuda ? t.is_cuda() && t.get_device_index() == device : t.is_cpu(); }
};

// Whether `count` elements from a tensor's first on lie in its storage, which somebody may have shrunk (FSDP frees what is
// sharded so).
inline bool lie_in_storage(const Tensor &t, int64_t count) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    int64_t offset, bytes;
    if (aoti_torch_get_storage_offset(t.get(), &offset) || aoti_torch_get_storage_size(t.get(), &bytes)) return false;
    return offset >= 0 && offset <= bytes / size && count <= bytes / size - offset;
}

// How many elements there are from a tensor's first to its last, with those that it leaves out.
inline int64_t span_of(const Tensor &t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
    return t.numel() ? last + 1 : 0;
}

inline void check(const char *op, const char *name, const Tensor &t, ScalarType dtype, int64_t numel,
                  Place place = {}) {
    STD_TORCH_CHECK(place.holds(t), "oplora::", op, ": ", name, " must be a ",
                    place.on_cuda ? "CUDA tensor, on the device of the others" : "CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "oplora::", op, ": ", name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_contiguous(), "oplora::", op, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(t.numel() == numel, "oplora::", op, ": ", name, " has ", t.numel(), " elements, expected ", numel);
    STD_TORCH_CHECK(lie_in_storage(t, t.numel()), "oplora::", op, ": ", name, " has no memory for its elements");
}

template <class T> const T *in(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }

template <class T> T *out(const Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

inline Tensor new_tensor(const Tensor &like, std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, {size.begin(), size.size()});
}

// ---- one generator ----

struct Sizes {
    int64_t H, Z, N;
    oplora_layout layout;
};

inline Sizes generator_sizes(const char *op, const Tensor &z, const Tensor &W1, const Tensor &c1, const Tensor &W2,
                             Place place = {}) {
    STD_TORCH_CHECK(z.dim() == 1 && W1.dim() == 2 && c1.dim() == 1 && W2.dim() == 2, "oplora::", op,
                    ": expected z (Z), W1 (H, Z), c1 (H), W2 (N, H)");
    const int64_t H = W1.size(0), Z = W1.size(1), N = W2.size(0);
    STD_TORCH_CHECK(H > 0 && Z > 0 && N > 0, "oplora::", op, ": H, Z and N must be at least 1, are ", H, ", ", Z, ", ",
                    N);
    STD_TORCH_CHECK(W2.size(1) == H, "oplora::", op, ": W2 has ", W2.size(1), " columns, W1 has ", H, " rows");
    const bool columns = !W2.is_contiguous() && W2.stride(0) == 1 && (W2.stride(1) == N || H == 1);
    STD_TORCH_CHECK(W2.is_contiguous() || columns, "oplora::", op, ": W2 must be contiguous, or its transpose");
    const ScalarType dtype = W2.scalar_type();
    STD_TORCH_CHECK(place.holds(W2), "oplora::", op, ": W2 is not on the device of this call");
    check(op, "z", z, dtype, Z, place);
    check(op, "W1", W1, dtype, H * Z, place);
    check(op, "c1", c1, dtype, H, place);
    STD_TORCH_CHECK(lie_in_storage(W2, N * H), "oplora::", op, ": W2 has no memory for its elements"); // no gaps in it
    return {H, Z, N, columns ? OPLORA_COLUMNS : OPLORA_ROWS};
}

} // namespace
