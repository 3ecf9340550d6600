// The torch ops' CUDA side. The kernels lie in liboplora_cuda.so (cuda_library.h).
//
// A step is planned once (csrc/cuda/plan.h): cuda_lean_plan, cuda_exact_plan and cuda_rate_plan return the plan and its
// table, both on the CPU, and the workspace. The caller copies the table to the device, keeps all three while the tensors
// stay where they are, and hands them to the ops that launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/adamw_exact.h"
#include "../cuda/adamw_lean.h"
#include "../cuda/adamw_rate.h"
#include "../cuda/generate.h"
#include "cuda_plan.h"

namespace {

// ---- generate ----

template <class T> struct cuda_core;
#define CUDA_CORE_OF(type, suffix) \
    template <> struct cuda_core<type> { \
        static auto generate() { return CUDA_CALL(oplora_cuda_generate_##suffix); } \
        static auto generate_backward() { return CUDA_CALL(oplora_cuda_generate_backward_##suffix); } \
    }
CUDA_CORE_OF(float, f32);
CUDA_CORE_OF(double, f64);

Tensor generate(const Tensor &z, const Tensor &W1, const Tensor &c1, const Tensor &W2, const Tensor &c2) {
    const char *const op = "generate";
    const Place place = place_of(op, W2);
    const Sizes s = generator_sizes(op, z, W1, c1, W2, place);
    STD_TORCH_CHECK(c2.dim() == 1, "oplora::generate: expected c2 (N)");
    check(op, "c2", c2, W2.scalar_type(), s.N, place);
    Tensor h = new_tensor(z, {s.H}), v = new_tensor(z, {s.N});
    for_dtype(op, W2, [&](auto type) {
        using T = decltype(type);
        on_device(op, place, [&](void *stream) {
            return cuda_core<T>::generate()(in<T>(z), in<T>(W1), in<T>(c1), in<T>(W2), in<T>(c2), s.layout, s.H, s.Z,
                                            s.N, out<T>(h), out<T>(v), stream);
        });
    });
    return v;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> generate_backward(const Tensor &g, const Tensor &z, const Tensor &W1,
                                                             const Tensor &c1, const Tensor &W2) {
    const char *const op = "generate_backward";
    const Place place = place_of(op, W2);
    const Sizes s = generator_sizes(op, z, W1, c1, W2, place);
    check(op, "g", g, W2.scalar_type(), s.N, place);
    const int64_t bytes = CUDA_CALL(oplora_cuda_generate_backward_workspace_bytes)(s.layout, s.H, s.Z, s.N);
    STD_TORCH_CHECK(bytes >= 0, "oplora::generate_backward: sizes that do not fit");
    Tensor dz = new_tensor(z, {s.Z}), dW1 = new_tensor(z, {s.H, s.Z}), dc1 = new_tensor(z, {s.H}),
           h = new_tensor(z, {s.H});
    const int64_t doubles = bytes / static_cast<int64_t>(sizeof(double)) + 1;
    Tensor workspace = torch::stable::new_empty(z, {&doubles, 1}, ScalarType::Double);
    for_dtype(op, W2, [&](auto type) {
        using T = decltype(type);
        on_device(op, place, [&](void *stream) {
            return cuda_core<T>::generate_backward()(in<T>(g), in<T>(z), in<T>(W1), in<T>(c1), in<T>(W2), s.layout, s.H,
                                                     s.Z, s.N, out<T>(dz), out<T>(dW1), out<T>(dc1), out<T>(h),
                                                     out<double>(workspace), stream);
        });
    });
    return {dz, dW1, dc1, h};
}

// ---- plans ----

Plan cuda_exact_plan(const Tensor &parameters, const Tensor &exp_avg, const Tensor &exp_avg_sq, const Tensor &decay,
                     const Tensor &moving, OptionalTensors factors, OptionalTensors rounded, OptionalTensors bases,
                     Tensors grads, const Tensor &sizes, const Tensor &adamw, const Tensor &rates, const Tensor &rows,
                     const Tensor &verdict, const Tensor &report) {
    const char *const op = "cuda_exact_plan";
    ExactLayers<float> layers(op, sizes, rows_like(factors, rounded), place_of(op, adamw));
    layers.set_state(parameters, exp_avg, exp_avg_sq, decay, moving);
    layers.set_report(report);
    const auto halves = set_tensors(layers, factors, rounded, bases, grads);
    return make_plan(Kind::exact, grads, layers, DeviceNumbers(layers, adamw, rates, rows), halves, verdict,
                     CUDA_CALL(oplora_cuda_exact_table_bytes), CUDA_CALL(oplora_cuda_exact_workspace_bytes),
                     CUDA_CALL(oplora_cuda_exact_plan_layers));
}

Plan cuda_lean_plan(const Tensor &numbers, const Tensor &moments, const Tensor &scalars, OptionalTensors factors,
                    OptionalTensors rounded, OptionalTensors bases, Tensors grads, const Tensor &sizes,
                    const Tensor &random, const Tensor &adamw, const Tensor &rates, const Tensor &rows,
                    const Tensor &verdict, const Tensor &report, const Tensor &dh) {
    const char *const op = "cuda_lean_plan";
    LeanLayers<float> layers(op, sizes, rows_like(factors, rounded), place_of(op, adamw));
    layers.set_state(numbers, moments, scalars);
    layers.set_random(random);
    layers.set_report(report);
    layers.set_dh(dh);
    const auto halves = set_tensors(layers, factors, rounded, bases, grads);
    check_values(layers);
    return make_plan(Kind::lean, grads, layers, DeviceNumbers(layers, adamw, rates, rows), halves, verdict,
                     CUDA_CALL(oplora_cuda_lean_table_bytes), CUDA_CALL(oplora_cuda_lean_workspace_bytes),
                     CUDA_CALL(oplora_cuda_lean_plan_layers));
}

Plan cuda_rate_plan(const Tensor &generated, const Tensor &exp_avg_sq, const Tensor &found, OptionalTensors factors,
                    OptionalTensors rounded, OptionalTensors bases, Tensors grads, const Tensor &sizes,
                    const Tensor &listens, const Tensor &adamw, const Tensor &rates, const Tensor &rows,
                    const Tensor &verdict, const Tensor &report) {
    const char *const op = "cuda_rate_plan";
    RateLayers<float> layers(op, sizes, rows_like(factors, rounded), place_of(op, adamw));
    layers.set_state(generated, exp_avg_sq);
    layers.set_starts({}, listens);
    layers.set_report(report);
    layers.check_found(found);
    const auto halves = set_tensors(layers, factors, rounded, bases, grads);
    check_values(layers);
    const auto plan_layers = [&](auto *all, int64_t n, auto *numbers, auto *of_factors, auto *some, auto... more) {
        return CUDA_CALL(oplora_cuda_rate_plan_layers)(all, n, numbers, of_factors, in<double>(found), some, more...);
    };
    return make_plan(Kind::rate, grads, layers, DeviceNumbers(layers, adamw, rates, rows), halves, verdict,
                     CUDA_CALL(oplora_cuda_rate_table_bytes), CUDA_CALL(oplora_cuda_rate_workspace_bytes), plan_layers);
}

// ---- launches ----

void cuda_exact_measure_(const Tensor &plan, const Tensor &table, const Tensor &workspace) {
    launch("cuda_exact_measure_", Kind::exact, Needs::gradients, plan, table, workspace,
           CUDA_CALL(oplora_cuda_exact_measure));
}

void cuda_exact_step_(const Tensor &plan, const Tensor &table, const Tensor &workspace, std::optional<Tensor> veto,
                      bool measured) {
    const char *const op = "cuda_exact_step_";
    const int *const vetoed = veto_of(op, veto, table);
    launch(op, Kind::exact, Needs::gradients, plan, table, workspace, [&](auto *planned, auto *on_table, void *stream) {
        return CUDA_CALL(oplora_cuda_exact_step)(planned, on_table, measured, vetoed, stream);
    });
}

void cuda_exact_generate_(const Tensor &plan, const Tensor &table, const Tensor &workspace) {
    launch("cuda_exact_generate_", Kind::exact, Needs::nothing, plan, table, workspace,
           CUDA_CALL(oplora_cuda_exact_generate));
}

void cuda_lean_start_(const Tensor &plan, const Tensor &table, const Tensor &workspace, double latent_std) {
    launch("cuda_lean_start_", Kind::lean, Needs::nothing, plan, table, workspace,
           [&](auto *planned, auto *on_table, void *stream) {
               return CUDA_CALL(oplora_cuda_lean_start)(planned, on_table, latent_std, stream);
           });
}

void cuda_lean_measure_(const Tensor &plan, const Tensor &table, const Tensor &workspace) {
    launch("cuda_lean_measure_", Kind::lean, Needs::gradients, plan, table, workspace,
           CUDA_CALL(oplora_cuda_lean_measure));
}

void cuda_lean_step_(const Tensor &plan, const Tensor &table, const Tensor &workspace, std::optional<Tensor> veto,
                     bool measured) {
    const char *const op = "cuda_lean_step_";
    const int *const vetoed = veto_of(op, veto, table);
    launch(op, Kind::lean, Needs::gradients, plan, table, workspace, [&](auto *planned, auto *on_table, void *stream) {
        return CUDA_CALL(oplora_cuda_lean_step)(planned, on_table, measured, vetoed, stream);
    });
}

void cuda_rate_measure_(const Tensor &plan, const Tensor &table, const Tensor &workspace) {
    launch("cuda_rate_measure_", Kind::rate, Needs::gradients, plan, table, workspace,
           CUDA_CALL(oplora_cuda_rate_measure));
}

void cuda_rate_step_(const Tensor &plan, const Tensor &table, const Tensor &workspace, std::optional<Tensor> veto) {
    const char *const op = "cuda_rate_step_";
    const int *const vetoed = veto_of(op, veto, table);
    launch(op, Kind::rate, Needs::gradients, plan, table, workspace, [&](auto *planned, auto *on_table, void *stream) {
        return CUDA_CALL(oplora_cuda_rate_step)(planned, on_table, vetoed, stream);
    });
}

Tensor rate_heard(const Tensor &report, const Tensor &rates, const Tensor &listening, const Tensor &groups) {
    const char *const op = "rate_heard";
    const Place place = place_of(op, report);
    Tensor heard = new_heard(op, report, rates, listening, groups, place);
    on_device(op, place, [&](void *stream) {
        return CUDA_CALL(oplora_cuda_rate_heard)(in<double>(report), listening.numel(), in<double>(rates),
                                                 rates.size(0), in<int64_t>(listening), in<double>(groups),
                                                 groups.size(0), out<double>(heard), stream);
    });
    return heard;
}

void find_rate_(const Tensor &found, const Tensor &heard, const std::optional<Tensor> &refused) {
    const char *const op = "find_rate_";
    const Place place = place_of(op, found);
    check(op, "found", found, ScalarType::Double, OPLORA_FOUND, place);
    check(op, "heard", heard, ScalarType::Double, heard.numel(), place);
    STD_TORCH_CHECK(heard.dim() == 2 && heard.size(1) == 3, "oplora::", op, ": expected heard (layers, 3)");
    if (refused) check(op, "refused", *refused, ScalarType::Int, 1, place);
    on_device(op, place, [&](void *stream) {
        return CUDA_CALL(oplora_cuda_find_rate)(out<double>(found), in<double>(heard), heard.size(0),
                                                refused ? in<int>(*refused) : nullptr, stream);
    });
}

} // namespace

// What a plan's tensors are is known to whoever made it, and to nobody who looks at a call: a launch reads and writes the
// factors, the state, the numbers, the verdict and the report at addresses that the table holds, and gets none of them as
// an argument. A schema can only tell what of its arguments is written, the workspace. Handing all of them over would box
// a tensor a factor at every step, and would be no more true: functionalization replaces a tensor that is written by
// another at another address, which no plan knows. So these ops are not for graphs that are reordered. No fake and no
// autograd is registered for them, so that torch.compile breaks its graph at each and runs it where it stands in the
// program, torch.export and fullgraph refuse it, and functionalization, which would have to copy what is written, too.
STABLE_TORCH_LIBRARY_FRAGMENT(oplora, m) {
    m.def("cuda_exact_plan(Tensor parameters, Tensor exp_avg, Tensor exp_avg_sq, Tensor decay, Tensor moving, "
          "Tensor?[] factors, Tensor?[] rounded, Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor adamw, "
          "Tensor rates, Tensor rows, Tensor verdict, Tensor report) -> (Tensor, Tensor, Tensor)");
    m.def("cuda_exact_measure_(Tensor plan, Tensor table, Tensor(a!) workspace) -> ()");
    m.def("cuda_exact_step_(Tensor plan, Tensor table, Tensor(a!) workspace, Tensor? veto, bool measured) -> ()");
    m.def("cuda_exact_generate_(Tensor plan, Tensor table, Tensor(a!) workspace) -> ()");
    m.def("cuda_lean_plan(Tensor numbers, Tensor moments, Tensor scalars, Tensor?[] factors, Tensor?[] rounded, "
          "Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor random, Tensor adamw, Tensor rates, Tensor rows, "
          "Tensor verdict, Tensor report, Tensor dh) -> (Tensor, Tensor, Tensor)");
    m.def("cuda_lean_start_(Tensor plan, Tensor table, Tensor(a!) workspace, float latent_std) -> ()");
    m.def("cuda_lean_measure_(Tensor plan, Tensor table, Tensor(a!) workspace) -> ()");
    m.def("cuda_lean_step_(Tensor plan, Tensor table, Tensor(a!) workspace, Tensor? veto, bool measured) -> ()");
    m.def("cuda_rate_plan(Tensor generated, Tensor exp_avg_sq, Tensor found, Tensor?[] factors, Tensor?[] rounded, "
          "Tensor?[] bases, Tensor[] grads, Tensor sizes, Tensor listens, Tensor adamw, Tensor rates, Tensor rows, "
          "Tensor verdict, Tensor report) -> (Tensor, Tensor, Tensor)");
    m.def("cuda_rate_measure_(Tensor plan, Tensor table, Tensor(a!) workspace) -> ()");
    m.def("cuda_rate_step_(Tensor plan, Tensor table, Tensor(a!) workspace, Tensor? veto) -> ()");
}

#define STEP_IMPLEMENTATIONS(m) \
    m.impl("cuda_exact_plan", TORCH_BOX(&cuda_exact_plan)); \
    m.impl("cuda_exact_measure_", TORCH_BOX(&cuda_exact_measure_)); \
    m.impl("cuda_exact_step_", TORCH_BOX(&cuda_exact_step_)); \
    m.impl("cuda_exact_generate_", TORCH_BOX(&cuda_exact_generate_)); \
    m.impl("cuda_lean_plan", TORCH_BOX(&cuda_lean_plan)); \
    m.impl("cuda_lean_start_", TORCH_BOX(&cuda_lean_start_)); \
    m.impl("cuda_lean_measure_", TORCH_BOX(&cuda_lean_measure_)); \
    m.impl("cuda_lean_step_", TORCH_BOX(&cuda_lean_step_)); \
    m.impl("cuda_rate_plan", TORCH_BOX(&cuda_rate_plan)); \
    m.impl("cuda_rate_measure_", TORCH_BOX(&cuda_rate_measure_)); \
    m.impl("cuda_rate_step_", TORCH_BOX(&cuda_rate_step_))

STABLE_TORCH_LIBRARY_IMPL(oplora, CUDA, m) {
    m.impl("generate", TORCH_BOX(&generate));
    m.impl("generate_backward", TORCH_BOX(&generate_backward));
    m.impl("rate_heard", TORCH_BOX(&rate_heard));
    m.impl("find_rate_", TORCH_BOX(&find_rate_));
    STEP_IMPLEMENTATIONS(m);
}

// Of a view that negates or conjugates lazily torch hands over a copy, which is gone when the op returns: a plan would keep
// its address. With the plan op's own parameters, as they are what lets go of the tensors.
template <auto op> struct refusal;
template <class... Parameters, Plan (*op)(Parameters...)> struct refusal<op> {
    static Plan refuse_lazy_views(Parameters...) {
        STD_TORCH_CHECK(
            false, "oplora: a plan keeps its tensors' addresses, and one of them is a lazily negated or conjugated "
                   "view; pass resolve_neg() or resolve_conj() of it");
    }
};
#define REFUSE_LAZY_VIEWS(m) \
    m.impl("cuda_exact_plan", TORCH_BOX(&refusal<&cuda_exact_plan>::refuse_lazy_views)); \
    m.impl("cuda_lean_plan", TORCH_BOX(&refusal<&cuda_lean_plan>::refuse_lazy_views)); \
    m.impl("cuda_rate_plan", TORCH_BOX(&refusal<&cuda_rate_plan>::refuse_lazy_views))
STABLE_TORCH_LIBRARY_IMPL(oplora, Negative, m) { REFUSE_LAZY_VIEWS(m); }
STABLE_TORCH_LIBRARY_IMPL(oplora, Conjugate, m) { REFUSE_LAZY_VIEWS(m); }

// for a library that executes kernels on the CPU; any other refuses CPU tensors
STABLE_TORCH_LIBRARY_IMPL(oplora, CPU, m) { STEP_IMPLEMENTATIONS(m); }
