// The torch ops, on PyTorch's stable C ABI alone: no c10:: or at:: symbol, no libpython, so one build serves every
// Python and every torch from the targeted version on. Compile with -DTORCH_TARGET_VERSION=... -DTORCH_STABLE_ONLY.
//
// Each op checks whatever could make the core read or write out of bounds, then calls it on torch's thread pool. What
// a user gets wrong is told by the Python layer first; these checks are for those who call torch.ops.oplora directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
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

void check_core(const char *op, oplora_status status) {
    STD_TORCH_CHECK(status == OPLORA_OK, "oplora::", op, ": ", oplora_strerror(status));
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};

std::unique_ptr<void, Free> workspace(const char *op, int64_t bytes) {
    STD_TORCH_CHECK(bytes >= 0, "oplora::", op, ": sizes that do not add up, or pass 2^63");
    std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) & ~size_t{63}));
    STD_TORCH_CHECK(memory, "oplora::", op, ": out of memory, for ", bytes, " bytes of scratch");
    return memory;
}

void check(const char *op, const char *name, const Tensor &t, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(t.is_cpu(), "oplora::", op, ": ", name, " must be a CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "oplora::", op, ": ", name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_contiguous(), "oplora::", op, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(t.numel() == numel, "oplora::", op, ": ", name, " has ", t.numel(), " elements, expected ", numel);
}

template <class T> const T *in(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }

template <class T> T *out(const Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

Tensor new_tensor(const Tensor &like, std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, {size.begin(), size.size()});
}

// ---- generate ----

struct Sizes {
    int64_t H, Z, N;
    oplora_layout layout;
};

Sizes generator_sizes(const char *op, const Tensor &z, const Tensor &W1, const Tensor &c1, const Tensor &W2) {
    STD_TORCH_CHECK(z.dim() == 1 && W1.dim() == 2 && c1.dim() == 1 && W2.dim() == 2, "oplora::", op,
                    ": expected z (Z), W1 (H, Z), c1 (H), W2 (N, H)");
    const int64_t H = W1.size(0), Z = W1.size(1), N = W2.size(0);
    STD_TORCH_CHECK(H > 0 && Z > 0 && N > 0, "oplora::", op, ": H, Z and N must be at least 1, are ", H, ", ", Z, ", ",
                    N);
    STD_TORCH_CHECK(W2.size(1) == H, "oplora::", op, ": W2 has ", W2.size(1), " columns, W1 has ", H, " rows");
    const bool columns = !W2.is_contiguous() && W2.stride(0) == 1 && (W2.stride(1) == N || H == 1);
    STD_TORCH_CHECK(W2.is_contiguous() || columns, "oplora::", op, ": W2 must be contiguous, or its transpose");
    STD_TORCH_CHECK(W2.is_cpu(), "oplora::", op, ": W2 must be a CPU tensor");
    const ScalarType dtype = W2.scalar_type();
    check(op, "z", z, dtype, Z);
    check(op, "W1", W1, dtype, H * Z);
    check(op, "c1", c1, dtype, H);
    return {H, Z, N, columns ? OPLORA_COLUMNS : OPLORA_ROWS};
}

Tensor generate(const Tensor &z, const Tensor &W1, const Tensor &c1, const Tensor &W2, const Tensor &c2) {
    const Sizes s = generator_sizes("generate", z, W1, c1, W2);
    STD_TORCH_CHECK(c2.dim() == 1, "oplora::generate: expected c2 (N)");
    check("generate", "c2", c2, W2.scalar_type(), s.N);
    Tensor h = new_tensor(z, {s.H}), v = new_tensor(z, {s.N});
    for_dtype("generate", W2, [&](auto type) {
        using T = decltype(type);
        check_core("generate", core<T>::generate(in<T>(z), in<T>(W1), in<T>(c1), in<T>(W2), in<T>(c2), s.layout, s.H,
                                                 s.Z, s.N, out<T>(h), out<T>(v), torch_parallel_for));
    });
    return v;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> generate_backward(const Tensor &g, const Tensor &z, const Tensor &W1,
                                                             const Tensor &c1, const Tensor &W2) {
    const char *const op = "generate_backward";
    const Sizes s = generator_sizes(op, z, W1, c1, W2);
    check(op, "g", g, W2.scalar_type(), s.N);
    Tensor dz = new_tensor(z, {s.Z}), dW1 = new_tensor(z, {s.H, s.Z}), dc1 = new_tensor(z, {s.H}),
           h = new_tensor(z, {s.H});
    const auto memory = workspace(op, oplora_generate_backward_workspace_bytes(s.H, s.Z, s.N));
    for_dtype(op, W2, [&](auto type) {
        using T = decltype(type);
        check_core(op, core<T>::generate_backward(in<T>(g), in<T>(z), in<T>(W1), in<T>(c1), in<T>(W2), s.layout, s.H,
                                                  s.Z, s.N, out<T>(dz), out<T>(dW1), out<T>(dc1), out<T>(h),
                                                  memory.get(), torch_parallel_for));
    });
    return {dz, dW1, dc1, h};
}

// ---- all layers of a model in one call ----

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;
enum { ADAMW = 7 }; // numbers a layer in `adamw`

int64_t report_size(const oplora_exact_f32 &layer) { return oplora_exact_report_size(layer.H); }
int64_t report_size(const oplora_exact_f64 &layer) { return oplora_exact_report_size(layer.H); }
int64_t report_size(const oplora_lean_f32 &) { return OPLORA_LEAN_REPORT; }
int64_t report_size(const oplora_lean_f64 &) { return OPLORA_LEAN_REPORT; }

// The core's structs for a list of tensors, checked; `layers` points into `factors`.
template <class T, class Layer> struct Layers {
    std::vector<Layer> layers;
    std::vector<typename core<T>::factor> factors;
    const char *op;

    Layers(const char *op, const std::vector<int64_t> &n_factors) : layers(n_factors.size()), op(op) {
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
            check(op, "a gradient", grads[f], core<T>::dtype, factors[f].rows);
            factors[f].g = in<T>(grads[f]);
        }
    }

    void set_factors(const Tensors &tensors, const OptionalTensors &bases) {
        STD_TORCH_CHECK(bases.size() == factors.size(), "oplora::", op, ": a base (or None) a factor is needed");
        for (size_t f = 0; f < factors.size(); f++) {
            check(op, "a factor", tensors[f], core<T>::dtype, factors[f].rows);
            factors[f].out = out<T>(tensors[f]);
            if (!bases[f]) continue;
            check(op, "a base", *bases[f], core<T>::dtype, factors[f].rows);
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
        check(op, "report", report, ScalarType::Double, size);
        double *at = out<double>(report);
        for (auto &layer : layers) {
            layer.report = at;
            at += report_size(layer);
        }
    }

    int64_t count() const { return static_cast<int64_t>(layers.size()); }
};

// Column `column` of a table of `width` numbers a layer.
std::vector<int64_t> column(const char *op, const std::vector<int64_t> &table, size_t width, size_t column) {
    STD_TORCH_CHECK(table.size() % width == 0, "oplora::", op, ": sizes needs ", width, " numbers a layer");
    std::vector<int64_t> values;
    for (size_t i = column; i < table.size(); i += width) values.push_back(table[i]);
    return values;
}

// Whether all gradients are finite; if not, only the first two numbers of each report are filled.
bool finite(const char *op, oplora_status status) {
    if (status == OPLORA_ENONFINITE) return false;
    check_core(op, status);
    return true;
}

// ---- exact ----

template <class T> struct ExactLayers : Layers<T, typename core<T>::exact> {
    enum { SIZES = 3 }; // H, Z, factors

    ExactLayers(const char *op, const Tensors &parameters, const std::vector<int64_t> &sizes)
        : Layers<T, typename core<T>::exact>(op, column(op, sizes, SIZES, 2)) {
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
            check(this->op, name, tensors[i], core<T>::dtype, oplora_size(layer.H, layer.Z, layer.N));
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
            check(this->op, "decay", decay[i], ScalarType::Double, layer.H);
            check(this->op, "moving", moving[i], ScalarType::Byte, layer.H);
            layer.decay = out<double>(decay[i]);
            layer.moving = out<uint8_t>(moving[i]);
        }
    }

    std::unique_ptr<void, Free> scratch() const {
        return workspace(this->op, core<T>::exact_workspace_bytes(this->layers.data(), this->count()));
    }
};

bool exact_measure_(Tensors parameters, Tensors grads, std::vector<int64_t> sizes, const Tensor &report) {
    if (parameters.empty()) return true;
    return for_dtype("exact_measure_", parameters[0], [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_measure_", parameters, sizes);
        layers.set_rows(grads);
        layers.set_parameters(parameters);
        layers.set_gradients(grads);
        layers.set_report(report);
        const auto memory = layers.scratch();
        return finite(layers.op,
                      core<T>::exact_measure(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

bool exact_step_(Tensors parameters, Tensors exp_avg, Tensors exp_avg_sq, Tensors decay, Tensors moving,
                 Tensors factors, OptionalTensors bases, Tensors grads, std::vector<int64_t> sizes,
                 std::vector<double> adamw, std::vector<int64_t> steps, const Tensor &report, bool measured) {
    if (parameters.empty()) return true;
    return for_dtype("exact_step_", parameters[0], [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_step_", parameters, sizes);
        layers.set_rows(factors);
        layers.set_parameters(parameters);
        layers.set_state("exp_avg", exp_avg, [](auto &layer, T *p) { layer.exp_avg = p; });
        layers.set_state("exp_avg_sq", exp_avg_sq, [](auto &layer, T *p) { layer.exp_avg_sq = p; });
        layers.set_columns(decay, moving);
        layers.set_factors(factors, bases);
        layers.set_gradients(grads);
        layers.set_adamw(adamw, steps);
        layers.set_report(report);
        const auto memory = layers.scratch();
        return finite(layers.op, core<T>::exact_step(layers.layers.data(), layers.count(), measured, memory.get(),
                                                     torch_parallel_for));
    });
}

void exact_generate_(Tensors parameters, Tensors factors, OptionalTensors bases, std::vector<int64_t> sizes) {
    if (parameters.empty()) return;
    for_dtype("exact_generate_", parameters[0], [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_generate_", parameters, sizes);
        layers.set_rows(factors);
        layers.set_parameters(parameters);
        layers.set_factors(factors, bases);
        const auto memory = layers.scratch();
        check_core(layers.op,
                   core<T>::exact_generate(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

// ---- lean: the state of all layers lies in three tensors, so that a call hands over few ----

template <class T> struct LeanLayers : Layers<T, typename core<T>::lean> {
    // H, Z, weight_rank, moment_rank, start, layer, factors, where the layer's numbers, moments and scalars begin
    enum { SIZES = 10 };

    LeanLayers(const char *op, const std::vector<int64_t> &sizes, int64_t seed)
        : Layers<T, typename core<T>::lean>(op, column(op, sizes, SIZES, 6)), sizes(sizes) {
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
        check(this->op, "numbers", numbers, core<T>::dtype, numbers.numel());
        check(this->op, "moments", moments, core<T>::moment_dtype, moments.numel());
        check(this->op, "scalars", scalars, ScalarType::Double, scalars.numel());
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
        check(this->op, "dh", dh, ScalarType::Double, size);
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

void lean_start_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors factors,
                 std::vector<int64_t> sizes, std::vector<int64_t> random, int64_t seed, double latent_std) {
    for_dtype("lean_start_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_start_", sizes, seed);
        layers.set_rows(factors);
        layers.set_state(numbers, moments, scalars);
        layers.set_factors(factors, OptionalTensors(factors.size()));
        layers.set_random(random);
        for (const auto &layer : layers.layers)
            check_core(layers.op, core<T>::lean_start(&layer, latent_std, torch_parallel_for));
    });
}

bool lean_measure_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors grads,
                   std::vector<int64_t> sizes, std::vector<int64_t> random, int64_t seed, const Tensor &report,
                   const Tensor &dh) {
    return for_dtype("lean_measure_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_measure_", sizes, seed);
        layers.set_rows(grads);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_gradients(grads);
        layers.set_report(report);
        layers.set_dh(dh);
        const auto memory = layers.scratch();
        return finite(layers.op,
                      core<T>::lean_measure(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

bool lean_step_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors factors,
                OptionalTensors bases, Tensors grads, std::vector<int64_t> sizes, std::vector<int64_t> random,
                int64_t seed, std::vector<double> adamw, std::vector<int64_t> steps, const Tensor &report,
                std::optional<Tensor> dh) {
    return for_dtype("lean_step_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_step_", sizes, seed);
        layers.set_rows(factors);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_factors(factors, bases);
        layers.set_gradients(grads);
        layers.set_adamw(adamw, steps);
        layers.set_report(report);
        if (dh) layers.set_dh(*dh);
        const auto memory = layers.scratch();
        return finite(layers.op, core<T>::lean_step(layers.layers.data(), layers.count(), dh.has_value(), memory.get(),
                                                    torch_parallel_for));
    });
}

} // namespace

STABLE_TORCH_LIBRARY(oplora, m) {
    m.def("generate(Tensor z, Tensor W1, Tensor c1, Tensor W2, Tensor c2) -> Tensor");
    m.def("generate_backward(Tensor g, Tensor z, Tensor W1, Tensor c1, Tensor W2) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("exact_measure_(Tensor[] parameters, Tensor[] grads, int[] sizes, Tensor(a!) report) -> bool");
    m.def("exact_step_(Tensor(a!)[] parameters, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] decay, "
          "Tensor(e!)[] moving, Tensor(f!)[] factors, Tensor?[] bases, Tensor[] grads, int[] sizes, float[] adamw, "
          "int[] steps, Tensor(g!) report, bool measured) -> bool");
    m.def("exact_generate_(Tensor[] parameters, Tensor(a!)[] factors, Tensor?[] bases, int[] sizes) -> ()");
    m.def("lean_start_(Tensor(a!) numbers, Tensor moments, Tensor(b!) scalars, Tensor(c!)[] factors, int[] sizes, "
          "int[] random, int seed, float latent_std) -> ()");
    m.def("lean_measure_(Tensor numbers, Tensor moments, Tensor scalars, Tensor[] grads, int[] sizes, int[] random, "
          "int seed, Tensor(a!) report, Tensor(b!) dh) -> bool");
    m.def("lean_step_(Tensor(a!) numbers, Tensor(b!) moments, Tensor(c!) scalars, Tensor(d!)[] factors, "
          "Tensor?[] bases, Tensor[] grads, int[] sizes, int[] random, int seed, float[] adamw, int[] steps, "
          "Tensor(e!) report, Tensor? dh) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(oplora, CPU, m) {
    m.impl("generate", TORCH_BOX(&generate));
    m.impl("generate_backward", TORCH_BOX(&generate_backward));
    m.impl("exact_measure_", TORCH_BOX(&exact_measure_));
    m.impl("exact_step_", TORCH_BOX(&exact_step_));
    m.impl("exact_generate_", TORCH_BOX(&exact_generate_));
    m.impl("lean_start_", TORCH_BOX(&lean_start_));
    m.impl("lean_measure_", TORCH_BOX(&lean_measure_));
    m.impl("lean_step_", TORCH_BOX(&lean_step_));
}
