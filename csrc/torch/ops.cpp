// The torch ops and their CPU side, on PyTorch's stable C ABI alone: no c10:: or at:: symbol, no libpython, so one build
// serves every Python and every torch from the targeted version on. Compile with -DTORCH_TARGET_VERSION=...
// -DTORCH_STABLE_ONLY. Each op checks its tensors (tensors.h, layers.h, states.h), then calls the core on torch's thread pool.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "states.h"

namespace {

// ---- generate ----

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

// Whether all gradients are finite; if not, only the first two numbers of each report are filled.
bool finite(const char *op, oplora_status status) {
    if (status == OPLORA_ENONFINITE) return false;
    check_core(op, status);
    return true;
}

bool exact_measure_(const Tensor &parameters, Tensors grads, const Tensor &sizes, const Tensor &report,
                    std::optional<Tensor> places) {
    return for_dtype("exact_measure_", parameters, [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_measure_", sizes, grads);
        layers.set_parameters(parameters);
        layers.set_gradients(grads);
        layers.set_places(places);
        layers.set_report(report);
        const auto memory = layers.scratch();
        return finite(layers.op,
                      core<T>::exact_measure(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

void exact_finish_(const Tensor &parameters, Tensors grads, const Tensor &sizes, const Tensor &report) {
    for_dtype("exact_finish_", parameters, [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_finish_", sizes, grads);
        layers.set_parameters(parameters);
        layers.set_gradients(grads);
        layers.set_report(report);
        const auto memory = layers.scratch();
        check_core(layers.op,
                   core<T>::exact_finish(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

bool exact_step_(const Tensor &parameters, const Tensor &exp_avg, const Tensor &exp_avg_sq, const Tensor &decay,
                 const Tensor &moving, Tensors factors, OptionalTensors bases, Tensors grads, const Tensor &sizes,
                 const Tensor &adamw, const Tensor &rates, const Tensor &rows, const Tensor &report, bool measured) {
    return for_dtype("exact_step_", parameters, [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_step_", sizes, factors);
        layers.set_state(parameters, exp_avg, exp_avg_sq, decay, moving);
        layers.set_factors(factors, bases);
        layers.set_gradients(grads);
        layers.set_report(report);
        const Table of_layers = layers.rows_of(adamw, rates, rows);
        layers.set_adamw(adamw, rates, of_layers);
        const auto memory = layers.scratch();
        const bool done = finite(layers.op, core<T>::exact_step(layers.layers.data(), layers.count(), measured,
                                                                memory.get(), torch_parallel_for));
        if (done) layers.count_steps(adamw, of_layers);
        return done;
    });
}

void exact_generate_(const Tensor &parameters, Tensors factors, OptionalTensors bases, const Tensor &sizes) {
    for_dtype("exact_generate_", parameters, [&](auto type) {
        using T = decltype(type);
        ExactLayers<T> layers("exact_generate_", sizes, factors);
        layers.set_parameters(parameters);
        layers.set_factors(factors, bases);
        const auto memory = layers.scratch();
        check_core(layers.op,
                   core<T>::exact_generate(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

void lean_start_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors factors,
                 const Tensor &sizes, const Tensor &random, double latent_std, std::optional<Tensor> places) {
    for_dtype("lean_start_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_start_", sizes, factors);
        layers.set_state(numbers, moments, scalars);
        layers.set_factors(factors, {});
        layers.set_random(random);
        layers.set_places(places);
        for (const auto &layer : layers.layers)
            check_core(layers.op, core<T>::lean_start(&layer, latent_std, torch_parallel_for));
    });
}

bool lean_measure_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors grads,
                   const Tensor &sizes, const Tensor &random, const Tensor &report, const Tensor &dh) {
    return for_dtype("lean_measure_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_measure_", sizes, grads);
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
                OptionalTensors bases, Tensors grads, const Tensor &sizes, const Tensor &random, const Tensor &adamw,
                const Tensor &rates, const Tensor &rows, const Tensor &report, std::optional<Tensor> dh) {
    return for_dtype("lean_step_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_step_", sizes, factors);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_factors(factors, bases);
        layers.set_gradients(grads);
        layers.set_report(report);
        if (dh) layers.set_dh(*dh);
        const Table of_layers = layers.rows_of(adamw, rates, rows);
        layers.set_adamw(adamw, rates, of_layers);
        const auto memory = layers.scratch();
        const bool done = finite(layers.op, core<T>::lean_step(layers.layers.data(), layers.count(), dh.has_value(),
                                                               memory.get(), torch_parallel_for));
        if (done) layers.count_steps(adamw, of_layers);
        return done;
    });
}

// The halves of a measurement and of a step that was measured, for factors that processes divide.
bool lean_reduce_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors grads,
                  const Tensor &sizes, const Tensor &random, const Tensor &places, const Tensor &report,
                  const Tensor &sums, std::optional<Tensor> adamw, const Tensor &rates, const Tensor &rows) {
    return for_dtype("lean_reduce_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_reduce_", sizes, grads);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_gradients(grads);
        layers.set_places(places);
        layers.set_report(report);
        if (adamw) layers.set_adamw(*adamw, rates, layers.rows_of(*adamw, rates, rows));
        double *const to = layers.sums(sums);
        const auto memory = layers.scratch();
        return finite(layers.op, core<T>::lean_reduce(layers.layers.data(), layers.count(), adamw.has_value(), to,
                                                      memory.get(), torch_parallel_for));
    });
}

void lean_finish_measure_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors grads,
                          const Tensor &sizes, const Tensor &random, const Tensor &places, const Tensor &report,
                          const Tensor &sums, const Tensor &dh) {
    for_dtype("lean_finish_measure_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_finish_measure_", sizes, grads);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_gradients(grads);
        layers.set_places(places);
        layers.set_report(report);
        layers.set_dh(dh);
        double *const from = layers.sums(sums);
        const auto memory = layers.scratch();
        check_core(layers.op, core<T>::lean_finish(layers.layers.data(), layers.count(), 0, from, memory.get(),
                                                   torch_parallel_for));
    });
}

bool lean_finish_step_(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, Tensors factors,
                       OptionalTensors bases, Tensors grads, const Tensor &sizes, const Tensor &random,
                       const Tensor &places, const Tensor &adamw, const Tensor &rates, const Tensor &rows,
                       const Tensor &report, const Tensor &sums, const Tensor &dh) {
    return for_dtype("lean_finish_step_", numbers, [&](auto type) {
        using T = decltype(type);
        LeanLayers<T> layers("lean_finish_step_", sizes, factors);
        layers.set_state(numbers, moments, scalars);
        layers.set_random(random);
        layers.set_factors(factors, bases);
        layers.set_gradients(grads);
        layers.set_places(places);
        layers.set_report(report);
        layers.set_dh(dh);
        const Table of_layers = layers.rows_of(adamw, rates, rows);
        layers.set_adamw(adamw, rates, of_layers);
        double *const from = layers.sums(sums);
        const auto memory = layers.scratch();
        const bool done = finite(layers.op, core<T>::lean_finish(layers.layers.data(), layers.count(), 1, from,
                                                                 memory.get(), torch_parallel_for));
        if (done) layers.count_steps(adamw, of_layers);
        return done;
    });
}

bool rate_measure_(const Tensor &generated, const Tensor &exp_avg_sq, Tensors factors, OptionalTensors bases,
                   Tensors grads, const Tensor &sizes, const Tensor &listens, const Tensor &adamw, const Tensor &rates,
                   const Tensor &rows, const Tensor &report) {
    return for_dtype("rate_measure_", generated, [&](auto type) {
        using T = decltype(type);
        RateLayers<T> layers("rate_measure_", sizes, factors);
        layers.set_state(generated, exp_avg_sq);
        layers.set_factors(factors, {});
        layers.set_gradients(grads);
        layers.set_starts(bases, listens);
        layers.set_report(report);
        layers.set_adamw(adamw, rates, layers.rows_of(adamw, rates, rows));
        const auto memory = layers.scratch();
        return finite(layers.op,
                      core<T>::rate_measure(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
    });
}

bool rate_step_(const Tensor &generated, const Tensor &exp_avg_sq, Tensors factors, Tensors grads, const Tensor &sizes,
                const Tensor &listens, const Tensor &adamw, const Tensor &rates, const Tensor &rows,
                const Tensor &report, const Tensor &found) {
    return for_dtype("rate_step_", generated, [&](auto type) {
        using T = decltype(type);
        RateLayers<T> layers("rate_step_", sizes, factors);
        layers.set_state(generated, exp_avg_sq);
        layers.set_factors(factors, {});
        layers.set_gradients(grads);
        layers.set_starts({}, listens);
        layers.set_report(report);
        layers.set_rate(found);
        const Table of_layers = layers.rows_of(adamw, rates, rows);
        layers.set_adamw(adamw, rates, of_layers);
        const auto memory = layers.scratch();
        const bool done = finite(
            layers.op, core<T>::rate_step(layers.layers.data(), layers.count(), memory.get(), torch_parallel_for));
        if (done) layers.count_steps(adamw, of_layers);
        return done;
    });
}

Tensor rate_heard(const Tensor &report, const Tensor &rates, const Tensor &listening, const Tensor &groups) {
    const char *const op = "rate_heard";
    Tensor heard = new_heard(op, report, rates, listening, groups);
    const double highest = oplora_highest_lr(in<double>(groups), groups.size(0));
    for (int64_t i = 0; i < listening.numel(); i++) {
        const int64_t row = in<int64_t>(listening)[i];
        STD_TORCH_CHECK(row >= 0 && row < rates.size(0), "oplora::", op, ": listening names no row of rates");
        oplora_hear(in<double>(report) + OPLORA_RATE_REPORT * i, in<double>(rates)[RATES * row], highest,
                    out<double>(heard) + 3 * i);
    }
    return heard;
}

void find_rate_(const Tensor &found, const Tensor &heard, const std::optional<Tensor> &refused) {
    const char *const op = "find_rate_";
    check(op, "found", found, ScalarType::Double, OPLORA_FOUND);
    check(op, "heard", heard, ScalarType::Double, heard.numel());
    STD_TORCH_CHECK(heard.dim() == 2 && heard.size(1) == 3, "oplora::", op, ": expected heard (layers, 3)");
    if (refused) {
        check(op, "refused", *refused, ScalarType::Int, 1);
        if (*in<int>(*refused)) return;
    }
    check_core(op, oplora_find_rate(out<double>(found), in<double>(heard), heard.size(0)));
}

// ---- fingerprint ----

// One that is not contiguous is copied first: in the order of its elements.
Tensor fingerprint(Tensors tensors) {
    const char *const op = "fingerprint";
    std::vector<oplora_bytes> bytes;
    bytes.reserve(tensors.size());
    for (auto &t : tensors) {
        STD_TORCH_CHECK(t.is_cpu(), "oplora::", op, ": expected CPU tensors");
        STD_TORCH_CHECK(lie_in_storage(t, span_of(t)), "oplora::", op, ": a tensor has no memory for its elements");
        if (!t.is_contiguous()) t = torch::stable::contiguous(t);
        bytes.push_back({t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size())});
    }
    const int64_t n = static_cast<int64_t>(bytes.size());
    Tensor hashes = torch::stable::empty({&n, 1}, ScalarType::Long, std::nullopt,
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU));
    const auto memory = workspace(op, oplora_fingerprint_workspace_bytes(bytes.data(), n));
    check_core(op, oplora_fingerprint(bytes.data(), n, out<uint64_t>(hashes), memory.get(), torch_parallel_for));
    return hashes;
}

} // namespace

STABLE_TORCH_LIBRARY(oplora, m) {
    m.def("generate(Tensor z, Tensor W1, Tensor c1, Tensor W2, Tensor c2) -> Tensor");
    m.def("generate_backward(Tensor g, Tensor z, Tensor W1, Tensor c1, Tensor W2) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("exact_measure_(Tensor parameters, Tensor[] grads, Tensor sizes, Tensor(a!) report, Tensor? places=None) -> "
          "bool");
    m.def("exact_finish_(Tensor parameters, Tensor[] grads, Tensor sizes, Tensor(a!) report) -> ()");
    m.def("exact_step_(Tensor(a!) parameters, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) decay, "
          "Tensor(e!) moving, Tensor(f!)[] factors, Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor(h!) adamw, "
          "Tensor rates, Tensor rows, Tensor(g!) report, bool measured) -> bool");
    m.def("exact_generate_(Tensor parameters, Tensor(a!)[] factors, Tensor?[] bases, Tensor sizes) -> ()");
    m.def("lean_start_(Tensor(a!) numbers, Tensor moments, Tensor(b!) scalars, Tensor(c!)[] factors, Tensor sizes, "
          "Tensor random, float latent_std, Tensor? places=None) -> ()");
    m.def("lean_measure_(Tensor numbers, Tensor moments, Tensor scalars, Tensor[] grads, Tensor sizes, Tensor random, "
          "Tensor(a!) report, Tensor(b!) dh) -> bool");
    m.def("lean_step_(Tensor(a!) numbers, Tensor(b!) moments, Tensor(c!) scalars, Tensor(d!)[] factors, "
          "Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor random, Tensor(f!) adamw, Tensor rates, Tensor rows, "
          "Tensor(e!) report, Tensor? dh) -> bool");
    m.def("lean_reduce_(Tensor numbers, Tensor moments, Tensor scalars, Tensor[] grads, Tensor sizes, Tensor random, "
          "Tensor places, Tensor(a!) report, Tensor(b!) sums, Tensor? adamw, Tensor rates, Tensor rows) -> bool");
    m.def("lean_finish_measure_(Tensor numbers, Tensor moments, Tensor scalars, Tensor[] grads, Tensor sizes, "
          "Tensor random, Tensor places, Tensor(a!) report, Tensor sums, Tensor(b!) dh) -> ()");
    m.def(
        "lean_finish_step_(Tensor(a!) numbers, Tensor(b!) moments, Tensor(c!) scalars, Tensor(d!)[] factors, "
        "Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor random, Tensor places, Tensor(f!) adamw, Tensor rates, "
        "Tensor rows, Tensor(e!) report, Tensor sums, Tensor dh) -> bool");
    m.def("rate_measure_(Tensor generated, Tensor exp_avg_sq, Tensor[] factors, Tensor?[] bases, Tensor[] grads, "
          "Tensor sizes, Tensor listens, Tensor adamw, Tensor rates, Tensor rows, Tensor(a!) report) -> bool");
    m.def("rate_step_(Tensor(a!) generated, Tensor(b!) exp_avg_sq, Tensor(c!)[] factors, Tensor[] grads, Tensor sizes, "
          "Tensor listens, Tensor(d!) adamw, Tensor rates, Tensor rows, Tensor report, Tensor found) -> bool");
    m.def("rate_heard(Tensor report, Tensor rates, Tensor listening, Tensor groups) -> Tensor");
    m.def("find_rate_(Tensor(a!) found, Tensor heard, Tensor? refused) -> ()");
    m.def("fingerprint(Tensor[] tensors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(oplora, CPU, m) {
    m.impl("generate", TORCH_BOX(&generate));
    m.impl("generate_backward", TORCH_BOX(&generate_backward));
    m.impl("exact_measure_", TORCH_BOX(&exact_measure_));
    m.impl("exact_finish_", TORCH_BOX(&exact_finish_));
    m.impl("exact_step_", TORCH_BOX(&exact_step_));
    m.impl("exact_generate_", TORCH_BOX(&exact_generate_));
    m.impl("lean_start_", TORCH_BOX(&lean_start_));
    m.impl("lean_measure_", TORCH_BOX(&lean_measure_));
    m.impl("lean_step_", TORCH_BOX(&lean_step_));
    m.impl("lean_reduce_", TORCH_BOX(&lean_reduce_));
    m.impl("lean_finish_measure_", TORCH_BOX(&lean_finish_measure_));
    m.impl("lean_finish_step_", TORCH_BOX(&lean_finish_step_));
    m.impl("rate_measure_", TORCH_BOX(&rate_measure_));
    m.impl("rate_step_", TORCH_BOX(&rate_step_));
    m.impl("rate_heard", TORCH_BOX(&rate_heard));
    m.impl("find_rate_", TORCH_BOX(&find_rate_));
}

// no tensor at all tells no device
STABLE_TORCH_LIBRARY_IMPL(oplora, CompositeExplicitAutograd, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }
