// What the ops of every device share: tensors, checked, as the core's structs.
//
// Whatever could make the core read or write out of bounds is refused here. What a user gets wrong is told by the Python
// layer first; these checks are for those who call torch.ops.oplora directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
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
        using moment = oplora_moment_##suffix; \
        using factor = oplora_factor_##suffix; \
        static constexpr ScalarType dtype = suffix##_dtype; \
        static constexpr auto generate = oplora_generate_##suffix; \
        static constexpr auto generate_backward = oplora_generate_backward_##suffix; \
        static constexpr auto exact_workspace_bytes = oplora_exact_workspace_bytes_##suffix; \
        static constexpr auto exact_measure = oplora_exact_measure_##suffix; \
        static constexpr auto exact_step = oplora_exact_step_##suffix; \
        static constexpr auto exact_generate = oplora_exact_generate_##suffix; \
        static constexpr ScalarType moment_dtype = suffix##_moment_dtype; \
        static constexpr auto lean_start = oplora_lean_start_##suffix; \
        static constexpr auto lean_workspace_bytes = oplora_lean_workspace_bytes_##suffix; \
        static constexpr auto lean_measure = oplora_lean_measure_##suffix; \
        static constexpr auto lean_step = oplora_lean_step_##suffix; \
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

inline void check(const char *op, const char *name, const Tensor &t, ScalarType dtype, int64_t numel,
                  Place place = {}) {
    STD_TORCH_CHECK(place.holds(t), "oplora::", op, ": ", name, " must be a ",
                    place.on_cuda ? "CUDA tensor, on the device of the others" : "CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "oplora::", op, ": ", name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_contiguous(), "oplora::", op, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(t.numel() == numel, "oplora::", op, ": ", name, " has ", t.numel(), " elements, expected ", numel);
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
    return {H, Z, N, columns ? OPLORA_COLUMNS : OPLORA_ROWS};
}

// ---- all layers of a model in one call ----

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;
enum { ADAMW = 7 }; // numbers a layer in `adamw`

inline int64_t report_size(const oplora_exact_f32 &layer) { return oplora_exact_report_size(layer.H); }
inline int64_t report_size(const oplora_exact_f64 &layer) { return oplora_exact_report_size(layer.H); }
inline int64_t report_size(const oplora_lean_f32 &) { return OPLORA_LEAN_REPORT; }
inline int64_t report_size(const oplora_lean_f64 &) { return OPLORA_LEAN_REPORT; }

// The core's structs for a list of tensors, checked; `layers` points into `factors`.
template <class T, class Layer> struct Layers {
    std::vector<Layer> layers;
    std::vector<typename core<T>::factor> factors;
    const char *op;
    Place place;

    Layers(const char *op, Place place, const std::vector<int64_t> &n_factors)
        : layers(n_factors.size()), op(op), place(place) {
        int64_t sum = 0;
        for (const int64_t count : n_factors) {
            STD_TORCH_CHECK(count >= 1 && count < (int64_t{1} << 32), "oplora::", op, ": a layer needs a factor");
            sum += count;
        }
        factors.resize(sum);
        for (size_t i = 0, f = 0; i < layers.size(); f += layers[i++].n_factors) {
            layers[i].n_factors = n_factors[i];
            layers[i].factors = factors.data() + f;
        }
    }

    // rows of each factor, and with them N; H and Z are there
    void set_rows(const Tensors &tensors) {
        STD_TORCH_CHECK(tensors.size() == factors.size(), "oplora::", op, ": ", tensors.size(), " factors, expected ",
                        factors.size());
        size_t f = 0;
        for (auto &layer : layers) {
            layer.N = 0;
            for (int64_t k = 0; k < layer.n_factors; k++, f++) layer.N += factors[f].rows = tensors[f].numel();
            STD_TORCH_CHECK(oplora_size(layer.H, layer.Z, layer.N) > 0, "oplora::", op,
                            ": H, Z and N must be at least 1, are ", layer.H, ", ", layer.Z, ", ", layer.N);
        }
    }

    void set_gradients(const Tensors &grads) {
        STD_TORCH_CHECK(grads.size() == factors.size(), "oplora::", op, ": a gradient a factor is needed");
        for (size_t f = 0; f < factors.size(); f++) {
            check(op, "a gradient", grads[f], core<T>::dtype, factors[f].rows, place);
            factors[f].g = in<T>(grads[f]);
        }
    }

    void set_factors(const Tensors &tensors, const OptionalTensors &bases) {
        STD_TORCH_CHECK(bases.size() == factors.size(), "oplora::", op, ": a base (or None) a factor is needed");
        for (size_t f = 0; f < factors.size(); f++) {
            check(op, "a factor", tensors[f], core<T>::dtype, factors[f].rows, place);
            factors[f].out = out<T>(tensors[f]);
            if (!bases[f]) continue;
            check(op, "a base", *bases[f], core<T>::dtype, factors[f].rows, place);
            factors[f].base = in<T>(*bases[f]);
        }
    }

    void set_adamw(const std::vector<double> &adamw, const std::vector<int64_t> &steps) {
        STD_TORCH_CHECK(adamw.size() == ADAMW * layers.size() && steps.size() == layers.size(), "oplora::", op,
                        ": adamw needs (lr, weight_lr, hidden_lr, beta1, beta2, eps, weight_decay) a layer, steps one "
                        "number");
        for (size_t i = 0; i < layers.size(); i++) {
            const double *const a = &adamw[ADAMW * i];
            layers[i].adamw = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], steps[i]};
        }
    }

    void set_report(const Tensor &report) {
        int64_t size = 0;
        for (const auto &layer : layers) size += report_size(layer);
        check(op, "report", report, ScalarType::Double, size, place);
        double *at = out<double>(report);
        for (auto &layer : layers) {
            layer.report = at;
            at += report_size(layer);
        }
    }

    int64_t count() const { return static_cast<int64_t>(layers.size()); }
};

// Column `column` of a table of `width` numbers a layer.
inline std::vector<int64_t> column(const char *op, const std::vector<int64_t> &table, size_t width, size_t column) {
    STD_TORCH_CHECK(table.size() % width == 0, "oplora::", op, ": sizes needs ", width, " numbers a layer");
    std::vector<int64_t> values;
    for (size_t i = column; i < table.size(); i += width) values.push_back(table[i]);
    return values;
}

// ---- exact ----

template <class T> struct ExactLayers : Layers<T, typename core<T>::exact> {
    enum { SIZES = 3 }; // H, Z, factors

    ExactLayers(const char *op, const Tensors &parameters, const std::vector<int64_t> &sizes, Place place = {})
        : Layers<T, typename core<T>::exact>(op, place, column(op, sizes, SIZES, 2)) {
        STD_TORCH_CHECK(parameters.size() == this->layers.size(), "oplora::", op,
                        ": sizes needs (H, Z, factors) a layer");
        for (size_t i = 0; i < parameters.size(); i++) {
            this->layers[i].H = sizes[SIZES * i];
            this->layers[i].Z = sizes[SIZES * i + 1];
        }
    }

    template <class Set> void set_state(const char *name, const Tensors &tensors, Set set) {
        STD_TORCH_CHECK(tensors.size() == this->layers.size(), "oplora::", this->op, ": ", name,
                        " needs a tensor a layer");
        for (size_t i = 0; i < tensors.size(); i++) {
            auto &layer = this->layers[i];
            check(this->op, name, tensors[i], core<T>::dtype, oplora_size(layer.H, layer.Z, layer.N), this->place);
            set(layer, out<T>(tensors[i]));
        }
    }

    void set_parameters(const Tensors &tensors) {
        set_state("parameters", tensors, [](auto &layer, T *p) { layer.parameters = p; });
    }

    void set_columns(const Tensors &decay, const Tensors &moving) {
        STD_TORCH_CHECK(decay.size() == this->layers.size() && moving.size() == this->layers.size(),
                        "oplora::", this->op, ": decay and moving need a tensor a layer");
        for (size_t i = 0; i < decay.size(); i++) {
            auto &layer = this->layers[i];
            check(this->op, "decay", decay[i], ScalarType::Double, layer.H, this->place);
            check(this->op, "moving", moving[i], ScalarType::Byte, layer.H, this->place);
            layer.decay = out<double>(decay[i]);
            layer.moving = out<uint8_t>(moving[i]);
        }
    }

    std::unique_ptr<void, Free> scratch() const {
        return workspace(this->op, core<T>::exact_workspace_bytes(this->layers.data(), this->count()));
    }
};

// ---- lean: the state of all layers lies in three tensors, so that a call hands over few ----

template <class T> struct LeanLayers : Layers<T, typename core<T>::lean> {
    // H, Z, weight_rank, moment_rank, start, layer, factors, where the layer's numbers, moments and scalars begin
    enum { SIZES = 10 };

    LeanLayers(const char *op, const std::vector<int64_t> &sizes, int64_t seed, Place place = {})
        : Layers<T, typename core<T>::lean>(op, place, column(op, sizes, SIZES, 6)), sizes(sizes) {
        for (size_t i = 0; i < this->layers.size(); i++) {
            const int64_t *const n = &sizes[SIZES * i];
            auto &layer = this->layers[i];
            layer.H = n[0], layer.Z = n[1], layer.weight_rank = n[2], layer.moment_rank = n[3];
            layer.start = n[4] ? OPLORA_SIGN : OPLORA_UNIFORM;
            layer.layer = static_cast<uint32_t>(n[5]);
            layer.seed = static_cast<uint64_t>(seed);
        }
    }

    void set_state(const Tensor &numbers, const Tensor &moments, const Tensor &scalars) {
        check(this->op, "numbers", numbers, core<T>::dtype, numbers.numel(), this->place);
        check(this->op, "moments", moments, core<T>::moment_dtype, moments.numel(), this->place);
        check(this->op, "scalars", scalars, ScalarType::Double, scalars.numel(), this->place);
        for (size_t i = 0; i < this->layers.size(); i++) {
            const int64_t *const at = &sizes[SIZES * i + 7];
            auto &l = this->layers[i];
            const int64_t n = oplora_lean_numbers(l.H, l.Z, l.N, l.weight_rank, l.moment_rank);
            const int64_t m = oplora_lean_moments(l.H, l.Z, l.N, l.weight_rank, l.moment_rank);
            STD_TORCH_CHECK(n > 0 && m > 0, "oplora::", this->op, ": ranks must be in 1 .. 8");
            STD_TORCH_CHECK(fits(at[0], n, numbers) && fits(at[1], m, moments) &&
                                fits(at[2], OPLORA_LEAN_SCALARS, scalars),
                            "oplora::", this->op, ": a layer's state does not lie within the tensors");
            l.numbers = out<T>(numbers) + at[0];
            l.moments = out<typename core<T>::moment>(moments) + at[1];
            l.scalars = out<double>(scalars) + at[2];
        }
    }

    void set_random(const std::vector<int64_t> &random) {
        STD_TORCH_CHECK(random.size() == this->factors.size(), "oplora::", this->op,
                        ": random needs a number a factor");
        for (size_t f = 0; f < random.size(); f++) this->factors[f].random = random[f] != 0;
    }

    void set_dh(const Tensor &dh) {
        int64_t size = 0;
        for (const auto &layer : this->layers) size += layer.H;
        check(this->op, "dh", dh, ScalarType::Double, size, this->place);
        double *at = out<double>(dh);
        for (auto &layer : this->layers) {
            layer.dh = at;
            at += layer.H;
        }
    }

    std::unique_ptr<void, Free> scratch() const {
        return workspace(this->op, core<T>::lean_workspace_bytes(this->layers.data(), this->count()));
    }

  private:
    const std::vector<int64_t> &sizes;

    static bool fits(int64_t begin, int64_t count, const Tensor &t) {
        return begin >= 0 && begin <= t.numel() && count <= t.numel() - begin;
    }
};

} // namespace
