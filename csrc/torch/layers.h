// All layers of a model in one call: tensors, checked, as the core's structs. states.h has what each state adds.
#pragma once

#include "tensors.h"

namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// Rows of `width` integers in a tensor on the CPU: numbers that Python hands over unboxed.
struct Table {
    const int64_t *numbers;
    int64_t count, width;

    Table(const char *op, const char *name, const Tensor &t, int64_t width, const char *each = "a layer")
        : width(width) {
        check(op, name, t, ScalarType::Long, t.numel());
        STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, "oplora::", op, ": ", name, " needs ", width, " integers ",
                        each);
        count = t.size(0);
        numbers = in<int64_t>(t);
    }

    const int64_t *operator[](size_t row) const { return numbers + static_cast<int64_t>(row) * width; }
};

// Numbers of a row of `adamw`: oplora_adamw's, whose last is an int64, how many steps were done.
enum { ADAMW = sizeof(oplora_adamw) / sizeof(double), RATES = 2, PLACE = 5 };

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
    std::vector<oplora_place> places;
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

    // table: where the rows of every factor lie that processes divide, as oplora_place has it; or None
    void set_places(const std::optional<Tensor> &table) {
        if (!table) return;
        const Table rows(op, "places", *table, PLACE, "a factor");
        STD_TORCH_CHECK(rows.count == static_cast<int64_t>(factors.size()), "oplora::", op,
                        ": places needs a row a factor");
        places.resize(factors.size());
        for (size_t f = 0; f < factors.size(); f++) {
            const int64_t *const n = rows[f];
            places[f] = {n[0], n[1], n[2], n[3], n[4] != 0};
            factors[f].place = &places[f];
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

} // namespace
