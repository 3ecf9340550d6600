// The layers of each state: exact, lean, rate.
#pragma once

#include "../shared/find_rate.h"
#include "layers.h"

namespace {

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

    // what processes add up
    double *sums(const Tensor &t) const {
        int64_t size = 0;
        for (const auto &l : this->layers) size += oplora_lean_sums_size(l.H, l.weight_rank, l.moment_rank);
        check(this->op, "sums", t, ScalarType::Double, size, this->place);
        return out<double>(t);
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

// ---- what the rate is found by ----

// Room for what all layers tell, once the tensors that it is made of are checked.
inline Tensor new_heard(const char *op, const Tensor &report, const Tensor &rates, const Tensor &listening,
                        const Tensor &groups, Place place = {}) {
    const int64_t n = listening.numel();
    check(op, "listening", listening, ScalarType::Long, n, place);
    STD_TORCH_CHECK(n <= report.numel(), "oplora::", op, ": report has fewer layers than listening");
    check(op, "report", report, ScalarType::Double, OPLORA_RATE_REPORT * n, place);
    check(op, "rates", rates, ScalarType::Double, rates.numel(), place);
    check(op, "groups", groups, ScalarType::Double, groups.numel(), place);
    STD_TORCH_CHECK(rates.dim() == 2 && rates.size(1) == RATES && groups.dim() == 2 &&
                        groups.size(1) == OPLORA_GROUP_NUMBERS,
                    "oplora::", op, ": expected rates (factors, 2) and groups (groups, 7)");
    return new_tensor(report, {n, 3});
}

} // namespace
