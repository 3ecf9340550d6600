// What the ops of every device share: tensors, checked, as the core's structs.
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
        static constexpr auto exact_step = oplora_exact_step_##suffix; \
        static constexpr auto exact_generate = oplora_exact_generate_##suffix; \
        static constexpr ScalarType moment_dtype = suffix##_moment_dtype; \
        static constexpr auto lean_start = oplora_lean_start_##suffix; \
        static constexpr auto lean_workspace_bytes = oplora_lean_workspace_bytes_##suffix; \
        static constexpr auto lean_measure = oplora_lean_measure_##suffix; \
        static constexpr auto lean_step = oplora_lean_step_##suffix; \
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

// Whether all elements of a contiguous tensor lie in its storage, which somebody may have shrunk (FSDP frees what is
// sharded so).
inline bool lies_in_storage(const Tensor &t) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    int64_t offset, bytes;
    if (aoti_torch_get_storage_offset(t.get(), &offset) || aoti_torch_get_storage_size(t.get(), &bytes)) return false;
    return offset >= 0 && offset <= bytes / size && t.numel() <= bytes / size - offset;
}

inline void check(const char *op, const char *name, const Tensor &t, ScalarType dtype, int64_t numel,
                  Place place = {}) {
    STD_TORCH_CHECK(place.holds(t), "oplora::", op, ": ", name, " must be a ",
                    place.on_cuda ? "CUDA tensor, on the device of the others" : "CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "oplora::", op, ": ", name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_contiguous(), "oplora::", op, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(t.numel() == numel, "oplora::", op, ": ", name, " has ", t.numel(), " elements, expected ", numel);
    STD_TORCH_CHECK(lies_in_storage(t), "oplora::", op, ": ", name, " has no memory for its elements");
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
    STD_TORCH_CHECK(lies_in_storage(W2), "oplora::", op, ": W2 has no memory for its elements"); // no gaps in it either
    return {H, Z, N, columns ? OPLORA_COLUMNS : OPLORA_ROWS};
}

// ---- all layers of a model in one call ----

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// Rows of `width` integers in a tensor on the CPU: numbers that Python hands over unboxed.
struct Table {
    const int64_t *numbers;
    int64_t count, width;

    Table(const char *op, const char *name, const Tensor &t, int64_t width) : width(width) {
        check(op, name, t, ScalarType::Long, t.numel());
        STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, "oplora::", op, ": ", name, " needs ", width,
                        " integers a layer");
        count = t.size(0);
        numbers = in<int64_t>(t);
    }

    const int64_t *operator[](size_t row) const { return numbers + static_cast<int64_t>(row) * width; }
};

// Numbers of a row of `adamw`: oplora_adamw's, whose last is an int64, how many steps were done.
enum { ADAMW = sizeof(oplora_adamw) / sizeof(double), RATES = 2 };

inline bool fits(int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && begin <= size && count <= size - begin;
}

// Rows of `columns` numbers in float64, as many as there are.
inline void check_rows(const char *op, const char *name, const Tensor &t, int64_t columns, Place place) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns, "oplora::", op, ": ", name, " needs rows of ", columns,
                    " numbers");
    check(op, name, t, ScalarType::Double, t.numel(), place);
}

inline int64_t report_size(const oplora_exact_f32 &layer) { return oplora_exact_report_size(layer.H); }
inline int64_t report_size(const oplora_exact_f64 &layer) { return oplora_exact_report_size(layer.H); }
inline int64_t report_size(const oplora_lean_f32 &) { return OPLORA_LEAN_REPORT; }
inline int64_t report_size(const oplora_lean_f64 &) { return OPLORA_LEAN_REPORT; }
inline int64_t report_size(const oplora_rate_f32 &) { return OPLORA_RATE_REPORT; }
inline int64_t report_size(const oplora_rate_f64 &) { return OPLORA_RATE_REPORT; }

// Whether H, Z and N of a layer are sizes of a generator; state rate has neither H nor Z.
template <class Layer> bool has_sizes(const Layer &layer) { return oplora_size(layer.H, layer.Z, layer.N) > 0; }
inline bool has_sizes(const oplora_rate_f32 &layer) { return layer.N > 0; }
inline bool has_sizes(const oplora_rate_f64 &layer) { return layer.N > 0; }

// The core's structs for a list of tensors, checked; `layers` points into `factors`.
template <class T, class Layer> struct Layers {
    std::vector<Layer> layers;
    std::vector<typename core<T>::factor> factors;
    const char *op;
    Place place;

    // `n_factors` is the column of sizes with a layer's number of factors. What sizes say is held against the tensors
    // before memory is taken for it: rows of each factor, and with them N, are the tensors'.
    Layers(const char *op, Place place, const Table &sizes, int n_factors, const Tensors &tensors)
        : op(op), place(place) {
        int64_t left = static_cast<int64_t>(tensors.size());
        for (int64_t i = 0; i < sizes.count; i++) {
            const int64_t n = sizes[static_cast<size_t>(i)][n_factors];
            STD_TORCH_CHECK(n >= 1 && n <= left, "oplora::", op, ": layer ", i, " has ", n, " factors, expected 1 to ",
                            left, ", as so many of the ", tensors.size(), " tensors are left");
            left -= n;
        }
        STD_TORCH_CHECK(left == 0, "oplora::", op, ": ", tensors.size(), " factors, expected ",
                        static_cast<int64_t>(tensors.size()) - left);
        layers.resize(static_cast<size_t>(sizes.count));
        factors.resize(tensors.size());
        for (size_t i = 0, f = 0; i < layers.size(); f += static_cast<size_t>(layers[i++].n_factors)) {
            layers[i].n_factors = sizes[i][n_factors];
            layers[i].factors = factors.data() + f;
        }
    }

  protected:
    // after H and Z are known
    void set_rows(const Tensors &tensors) {
        size_t f = 0;
        for (auto &layer : layers) {
            layer.N = 0;
            for (int64_t k = 0; k < layer.n_factors; k++, f++) {
                layer.N += factors[f].rows = tensors[f].numel();
                STD_TORCH_CHECK(factors[f].rows > 0, "oplora::", op, ": a factor is empty");
            }
            STD_TORCH_CHECK(has_sizes(layer), "oplora::", op,
                            ": H, Z and N must be at least 1, and their products fit");
        }
    }

  public:
    void set_gradients(const Tensors &grads) {
        STD_TORCH_CHECK(grads.size() == factors.size(), "oplora::", op, ": a gradient a factor is needed");
        for (size_t f = 0; f < factors.size(); f++) {
            check(op, "a gradient", grads[f], core<T>::dtype, factors[f].rows, place);
            factors[f].g = in<T>(grads[f]);
        }
    }

    // bases: none at all, or a base or None a factor
    void set_factors(const Tensors &tensors, const OptionalTensors &bases) {
        STD_TORCH_CHECK(tensors.size() == factors.size(), "oplora::", op, ": a tensor a factor is needed");
        STD_TORCH_CHECK(bases.empty() || bases.size() == factors.size(), "oplora::", op,
                        ": a base (or None) a factor is needed");
        for (size_t f = 0; f < factors.size(); f++) {
            check(op, "a factor", tensors[f], core<T>::dtype, factors[f].rows, place);
            factors[f].out = out<T>(tensors[f]);
            if (bases.empty() || !bases[f]) continue;
            check(op, "a base", *bases[f], core<T>::dtype, factors[f].rows, place);
            factors[f].base = in<T>(*bases[f]);
        }
    }

    // Rows of `rows`: a layer's in adamw, and in rates that of its first factor, which the others follow.
    Table rows_of(const Tensor &adamw, const Tensor &rates, const Tensor &rows) const {
        const Table table(op, "rows", rows, 2);
        check_rows(op, "adamw", adamw, ADAMW, place);
        check_rows(op, "rates", rates, RATES, place);
        STD_TORCH_CHECK(table.count == count(), "oplora::", op, ": rows needs a row a layer");
        for (size_t i = 0; i < layers.size(); i++) {
            STD_TORCH_CHECK(fits(table[i][0], 1, adamw.size(0)), "oplora::", op, ": adamw has no row ", table[i][0]);
            STD_TORCH_CHECK(fits(table[i][1], layers[i].n_factors, rates.size(0)), "oplora::", op, ": rates has no ",
                            layers[i].n_factors, " rows from row ", table[i][1]);
        }
        return table;
    }

    void set_adamw(const Tensor &adamw, const Tensor &rates, const Table &rows) {
        size_t f = 0;
        for (size_t i = 0; i < layers.size(); i++) {
            std::memcpy(&layers[i].adamw, in<double>(adamw) + ADAMW * rows[i][0], sizeof(oplora_adamw));
            STD_TORCH_CHECK(layers[i].adamw.step >= 0 && layers[i].adamw.step < INT64_MAX, "oplora::", op,
                            ": a step count below 0");
            layers[i].adamw.step++; // of steps done it becomes the number of this one
            const double *rate = in<double>(rates) + RATES * rows[i][1];
            for (int64_t k = 0; k < layers[i].n_factors; k++, f++, rate += RATES)
                factors[f].lr = rate[0], factors[f].weight_decay = rate[1];
        }
    }

    // after a step that was done
    void count_steps(const Tensor &adamw, const Table &rows) const {
        for (size_t i = 0; i < layers.size(); i++)
            std::memcpy(out<double>(adamw) + ADAMW * rows[i][0] + ADAMW - 1, &layers[i].adamw.step, sizeof(int64_t));
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

// ---- the state of all layers lies in a few tensors, so that a call hands over few ----

template <class T> struct ExactLayers : Layers<T, typename core<T>::exact> {
    // H, Z, factors, where the layer begins in the three tensors of its numbers, in `decay`, in `moving`
    enum { SIZES = 6 };

    // tensors: of every factor one of its rows, a factor or a gradient
    ExactLayers(const char *op, const Tensor &sizes, const Tensors &tensors, Place place = {})
        : ExactLayers(op, Table(op, "sizes", sizes, SIZES), tensors, place) {}

    void set_parameters(const Tensor &t) {
        set_numbers("parameters", t, [](auto &layer, T *p) { layer.parameters = p; });
    }

    void set_state(const Tensor &parameters, const Tensor &exp_avg, const Tensor &exp_avg_sq, const Tensor &decay,
                   const Tensor &moving) {
        set_parameters(parameters);
        set_numbers("exp_avg", exp_avg, [](auto &layer, T *p) { layer.exp_avg = p; });
        set_numbers("exp_avg_sq", exp_avg_sq, [](auto &layer, T *p) { layer.exp_avg_sq = p; });
        check(this->op, "decay", decay, ScalarType::Double, decay.numel(), this->place);
        check(this->op, "moving", moving, ScalarType::Byte, moving.numel(), this->place);
        for (size_t i = 0; i < this->layers.size(); i++) {
            auto &layer = this->layers[i]; // of which oplora_size found that H N fits, and N >= n_factors
            STD_TORCH_CHECK(fits(sizes[i][4], layer.n_factors * layer.H, decay.numel()) &&
                                fits(sizes[i][5], layer.H, moving.numel()),
                            "oplora::", this->op, ": a layer does not lie within decay and moving");
            layer.decay = out<double>(decay) + sizes[i][4];
            layer.moving = out<uint8_t>(moving) + sizes[i][5];
        }
    }

    std::unique_ptr<void, Free> scratch() const {
        return workspace(this->op, core<T>::exact_workspace_bytes(this->layers.data(), this->count()));
    }

  private:
    const Table sizes;

    ExactLayers(const char *op, const Table &sizes, const Tensors &tensors, Place place)
        : Layers<T, typename core<T>::exact>(op, place, sizes, 2, tensors), sizes(sizes) {
        for (size_t i = 0; i < this->layers.size(); i++)
            this->layers[i].H = sizes[i][0], this->layers[i].Z = sizes[i][1];
        this->set_rows(tensors);
    }

    template <class Set> void set_numbers(const char *name, const Tensor &t, Set set) {
        check(this->op, name, t, core<T>::dtype, t.numel(), this->place);
        for (size_t i = 0; i < this->layers.size(); i++) {
            auto &layer = this->layers[i];
            STD_TORCH_CHECK(fits(sizes[i][3], oplora_size(layer.H, layer.Z, layer.N), t.numel()), "oplora::", this->op,
                            ": a layer does not lie within ", name);
            set(layer, out<T>(t) + sizes[i][3]);
        }
    }
};

template <class T> struct LeanLayers : Layers<T, typename core<T>::lean> {
    // H, Z, weight_rank, moment_rank, start (1: signs), layer, factors, where the layer's numbers, moments and scalars
    // begin, seed
    enum { SIZES = 11 };

    // tensors: of every factor one of its rows, a factor or a gradient
    LeanLayers(const char *op, const Tensor &sizes, const Tensors &tensors, Place place = {})
        : LeanLayers(op, Table(op, "sizes", sizes, SIZES), tensors, place) {}

    void set_state(const Tensor &numbers, const Tensor &moments, const Tensor &scalars) {
        check(this->op, "numbers", numbers, core<T>::dtype, numbers.numel(), this->place);
        check(this->op, "moments", moments, core<T>::moment_dtype, moments.numel(), this->place);
        check(this->op, "scalars", scalars, ScalarType::Double, scalars.numel(), this->place);
        for (size_t i = 0; i < this->layers.size(); i++) {
            const int64_t *const at = sizes[i] + 7;
            auto &l = this->layers[i];
            const int64_t n = oplora_lean_numbers(l.H, l.Z, l.N, l.weight_rank, l.moment_rank);
            const int64_t m = oplora_lean_moments(l.H, l.Z, l.N, l.weight_rank, l.moment_rank);
            STD_TORCH_CHECK(n > 0 && m > 0, "oplora::", this->op, ": ranks must be in 1 .. 8");
            STD_TORCH_CHECK(fits(at[0], n, numbers.numel()) && fits(at[1], m, moments.numel()) &&
                                fits(at[2], OPLORA_LEAN_SCALARS, scalars.numel()),
                            "oplora::", this->op, ": a layer's state does not lie within the tensors");
            l.numbers = out<T>(numbers) + at[0];
            l.moments = out<typename core<T>::moment>(moments) + at[1];
            l.scalars = out<double>(scalars) + at[2];
        }
    }

    void set_random(const Tensor &random) {
        check(this->op, "random", random, ScalarType::Long, static_cast<int64_t>(this->factors.size()));
        for (size_t f = 0; f < this->factors.size(); f++) this->factors[f].random = in<int64_t>(random)[f] != 0;
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
    const Table sizes;

    LeanLayers(const char *op, const Table &sizes, const Tensors &tensors, Place place)
        : Layers<T, typename core<T>::lean>(op, place, sizes, 6, tensors), sizes(sizes) {
        for (size_t i = 0; i < this->layers.size(); i++) {
            const int64_t *const n = sizes[i];
            auto &layer = this->layers[i];
            STD_TORCH_CHECK(n[4] == 0 || n[4] == 1, "oplora::", op, ": start must be 0 or 1, is ", n[4]);
            STD_TORCH_CHECK(n[5] >= 0 && n[5] <= UINT32_MAX, "oplora::", op, ": no layer has number ", n[5]);
            layer.H = n[0], layer.Z = n[1], layer.weight_rank = n[2], layer.moment_rank = n[3];
            layer.start = n[4] ? OPLORA_SIGN : OPLORA_UNIFORM;
            layer.layer = static_cast<uint32_t>(n[5]);
            layer.seed = static_cast<uint64_t>(n[10]);
        }
        this->set_rows(tensors);
    }
};

template <class T> struct RateLayers : Layers<T, typename core<T>::rate> {
    // factors, where the layer begins in `generated` and `exp_avg_sq`
    enum { SIZES = 2 };

    // tensors: of every factor one of its rows, a factor or a gradient
    RateLayers(const char *op, const Tensor &sizes, const Tensors &tensors, Place place = {})
        : RateLayers(op, Table(op, "sizes", sizes, SIZES), tensors, place) {}

    void set_state(const Tensor &generated, const Tensor &exp_avg_sq) {
        check(this->op, "generated", generated, core<T>::dtype, generated.numel(), this->place);
        check(this->op, "exp_avg_sq", exp_avg_sq, core<T>::dtype, generated.numel(), this->place);
        for (size_t i = 0; i < this->layers.size(); i++) {
            auto &layer = this->layers[i];
            STD_TORCH_CHECK(fits(sizes[i][1], layer.N, generated.numel()), "oplora::", this->op,
                            ": a layer does not lie within generated");
            layer.generated = out<T>(generated) + sizes[i][1];
            layer.exp_avg_sq = out<T>(exp_avg_sq) + sizes[i][1];
        }
    }

    void set_starts(const OptionalTensors &bases, const Tensor &listens) {
        check(this->op, "listens", listens, ScalarType::Long, static_cast<int64_t>(this->factors.size()));
        STD_TORCH_CHECK(bases.empty() || bases.size() == this->factors.size(), "oplora::", this->op,
                        ": a base (or None) a factor is needed");
        for (size_t f = 0; f < this->factors.size(); f++) {
            auto &factor = this->factors[f];
            factor.listens = in<int64_t>(listens)[f] != 0;
            if (bases.empty() || !bases[f]) continue;
            check(this->op, "a base", *bases[f], core<T>::dtype, factor.rows, this->place);
            factor.base = in<T>(*bases[f]);
        }
    }

    void check_found(const Tensor &found) const {
        check(this->op, "found", found, ScalarType::Double, OPLORA_FOUND, this->place);
    }

    // The first number of `found` (engines/rate.py): what every factor's lr is multiplied by. It is read here.
    void set_rate(const Tensor &found) {
        check_found(found);
        for (auto &layer : this->layers) layer.rate = *in<double>(found);
    }

    std::unique_ptr<void, Free> scratch() const {
        return workspace(this->op, core<T>::rate_workspace_bytes(this->layers.data(), this->count()));
    }

  private:
    const Table sizes;

    RateLayers(const char *op, const Table &sizes, const Tensors &tensors, Place place)
        : Layers<T, typename core<T>::rate>(op, place, sizes, 0, tensors), sizes(sizes) {
        this->set_rows(tensors);
    }
};

} // namespace
