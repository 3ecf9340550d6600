// The torch ops' CUDA side. The kernels lie in liboplora_cuda.so, a plain C library beside this one, which is loaded when
// the first CUDA tensor arrives: so nothing here needs CUDA to be built, or to be there.
//
// A step is planned once (csrc/cuda/plan.h): cuda_lean_plan, cuda_exact_plan and cuda_rate_plan return the plan and its
// table, both on the CPU, and the workspace. The caller copies the table to the device, keeps all three while the tensors
// stay where they are, and hands them to the ops that launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <dlfcn.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <tuple>

#include "../cuda/adamw_exact.h"
#include "../cuda/adamw_lean.h"
#include "../cuda/adamw_rate.h"
#include "../cuda/generate.h"
#include "layers.h"

namespace {

// ---- the library, and torch's stream ----

struct CudaLibrary {
    void *handle;
    std::string path;
    bool on_cpu; // a stand-in that executes kernels on the CPU, for tests

    template <class F> F find(const char *name) const {
        void *const function = dlsym(handle, name);
        STD_TORCH_CHECK(function, "oplora: ", path, " has no ", name, ": it was built from other sources. ",
                        how_to_build);
        return reinterpret_cast<F>(function);
    }

    static constexpr const char *how_to_build =
        "Install the CUDA toolkit 12.8 or newer (nvcc; CUDA_HOME names its folder), then build again: "
        "OPLORA_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir oplora, or `pip install .` in its "
        "sources.";
};

// OPLORA_CUDA_LIBRARY names another file; else it lies beside this one.
std::string library_path() {
    if (const char *const path = std::getenv("OPLORA_CUDA_LIBRARY")) return path;
    Dl_info here;
    STD_TORCH_CHECK(dladdr(reinterpret_cast<void *>(&library_path), &here), "oplora: dladdr failed");
    const std::string path(here.dli_fname);
    return path.substr(0, path.rfind('/') + 1) + "liboplora_cuda.so";
}

void check_interface(const CudaLibrary &library) {
    const std::string theirs = library.find<decltype(&oplora_cuda_interface)>("oplora_cuda_interface")();
    STD_TORCH_CHECK(theirs == OPLORA_CUDA_HASH, "oplora: ", library.path, " was built from other sources: its ",
                    "interface is ", theirs, ", that of liboplora_torch.so ", OPLORA_CUDA_HASH, ". ",
                    CudaLibrary::how_to_build);
}

std::string cuda_version(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// CUDA's numbers for errors whose sentence does not say what to do.
enum { INSUFFICIENT_DRIVER = 35, NO_KERNEL_IMAGE = 209, UNSUPPORTED_PTX = 222 };

std::string advice(const CudaLibrary &library, int error) {
    if (error == NO_KERNEL_IMAGE)
        return " (" + library.path +
               " has no code for this GPU: build again with its architecture, as in "
               "OPLORA_CUDA_ARCHS=\"90 100\"; compute_cap of nvidia-smi tells it)";
    if (error != INSUFFICIENT_DRIVER && error != UNSUPPORTED_PTX) return "";
    int driver, runtime;
    library.find<decltype(&oplora_cuda_ready)>("oplora_cuda_ready")(&driver, &runtime);
    const std::string major = std::to_string(driver / 1000);
    return " (" +
           (driver ? "the NVIDIA driver serves CUDA up to " + cuda_version(driver) : "there is no NVIDIA driver") +
           ", and " + library.path + " was built with CUDA " + cuda_version(runtime) + ": install a driver for CUDA " +
           cuda_version(runtime) + " or newer" +
           (driver >= 12000 ? ", or build again with a CUDA toolkit " + major + ".x, from 12.8 on" : "") + ")";
}

// A driver that is older than the CUDA runtime inside the library is told when it is loaded, before anything is launched.
void check_driver(const CudaLibrary &library) {
    int driver, runtime;
    const int error = library.find<decltype(&oplora_cuda_ready)>("oplora_cuda_ready")(&driver, &runtime);
    STD_TORCH_CHECK(error != INSUFFICIENT_DRIVER, "oplora: the CUDA kernels do not run here", advice(library, error));
}

const CudaLibrary &cuda() {
    static const CudaLibrary library = [] {
        const std::string path = library_path();
        void *const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        STD_TORCH_CHECK(handle, "oplora: a CUDA tensor needs the CUDA kernels, and ", path,
                        " does not load: ", dlerror(), ". ", CudaLibrary::how_to_build);
        const CudaLibrary found = {handle, path, dlsym(handle, "oplora_cuda_on_cpu") != nullptr};
        check_interface(found);
        check_driver(found);
        return found;
    }();
    return library;
}
#define CUDA_CALL(name) cuda().find<decltype(&name)>(#name)

// libtorch_cuda.so is in the process whenever a CUDA tensor is; it is not linked, so that this library also loads beside a
// torch without CUDA.
void *current_stream(Place place) {
    if (!place.on_cuda) return nullptr;
    using Get = AOTITorchError (*)(int32_t, void **);
    static const Get get = [] {
        void *const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void *stream = nullptr;
    STD_TORCH_CHECK(get && get(place.device, &stream) == 0, "oplora: torch's current CUDA stream cannot be read");
    return stream;
}

// Where the tensors of a call lie: t is one of them.
Place place_of(const char *op, const Tensor &t) {
    if (t.is_cuda()) return {true, t.get_device_index()};
    STD_TORCH_CHECK(cuda().on_cpu, "oplora::", op, ": expected CUDA tensors");
    return {};
}

// Calls launch(stream) with the place's device as the current one.
template <class F> void on_device(const char *op, Place place, F launch) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (place.on_cuda) guard.emplace(place.device);
    const int error = launch(current_stream(place));
    STD_TORCH_CHECK(error == 0, "oplora::", op, ": CUDA says: ", CUDA_CALL(oplora_cuda_strerror)(error),
                    advice(cuda(), error));
}

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

// Where on the device each layer's numbers are.
struct DeviceNumbers {
    std::vector<oplora_adamw *> adamw;
    std::vector<const double *> rates;

    template <class L> DeviceNumbers(const L &layers, const Tensor &all, const Tensor &all_rates, const Tensor &rows) {
        const Table table = layers.rows_of(all, all_rates, rows);
        for (size_t i = 0; i < layers.layers.size(); i++) {
            adamw.push_back(reinterpret_cast<oplora_adamw *>(out<double>(all)) + table[i][0]);
            rates.push_back(in<double>(all_rates) + RATES * table[i][1]);
        }
    }
};

oplora_dtype half_dtype(const char *op, const Tensor &t) {
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "oplora::", op,
                    ": a rounded factor must be bfloat16 or float16");
    return dtype == ScalarType::BFloat16 ? OPLORA_BF16 : OPLORA_F16;
}

// Gradients, and the factors of 16 bits: of each pair of factor and rounded one is given, or (lean, rate) both. No
// gradients: the plan is not for a step.
template <class L>
std::vector<oplora_cuda_half> set_tensors(L &layers, const OptionalTensors &factors, const OptionalTensors &rounded,
                                          const OptionalTensors &bases, const Tensors &grads) {
    const char *const op = layers.op;
    const size_t n = layers.factors.size();
    STD_TORCH_CHECK(factors.size() == n && rounded.size() == n && (bases.empty() || bases.size() == n) &&
                        (grads.empty() || grads.size() == n),
                    "oplora::", op, ": factors, rounded, bases and grads need a tensor (or None) a factor");
    std::vector<oplora_cuda_half> halves(n, {nullptr, nullptr, OPLORA_F32});
    for (size_t f = 0; f < n; f++) {
        auto &to = layers.factors[f];
        STD_TORCH_CHECK(factors[f] || rounded[f], "oplora::", op, ": a factor is missing");
        if (factors[f]) {
            check(op, "a factor", *factors[f], ScalarType::Float, to.rows, layers.place);
            to.out = out<float>(*factors[f]);
        }
        if (!bases.empty() && bases[f]) {
            check(op, "a base", *bases[f], ScalarType::Float, to.rows, layers.place);
            to.base = in<float>(*bases[f]);
        }
        const ScalarType dtype = rounded[f] ? rounded[f]->scalar_type() : ScalarType::Float;
        if (!grads.empty()) check(op, "a gradient", grads[f], dtype, to.rows, layers.place);
        if (!rounded[f]) {
            if (!grads.empty()) to.g = in<float>(grads[f]);
            continue;
        }
        check(op, "a rounded factor", *rounded[f], dtype, to.rows, layers.place);
        halves[f] = {grads.empty() ? nullptr : static_cast<const uint16_t *>(grads[f].const_data_ptr()),
                     static_cast<uint16_t *>(rounded[f]->mutable_data_ptr()), half_dtype(op, *rounded[f])};
    }
    return halves;
}

// For the states whose steps add to what the factors hold.
template <class L> void check_values(const L &layers) {
    for (const auto &factor : layers.factors)
        STD_TORCH_CHECK(factor.out, "oplora::", layers.op, ": every factor's value before rounding is needed");
}

Tensors rows_like(const OptionalTensors &factors, const OptionalTensors &rounded) {
    Tensors tensors;
    for (size_t f = 0; f < factors.size() && f < rounded.size(); f++) {
        STD_TORCH_CHECK(factors[f] || rounded[f], "oplora: a factor is missing");
        tensors.push_back(factors[f] ? *factors[f] : *rounded[f]);
    }
    return tensors;
}

Tensor bytes_on_cpu(int64_t bytes) {
    return torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

using Plan = std::tuple<Tensor, Tensor, Tensor>; // plan, table, workspace

enum class Kind : int64_t { exact = 1, lean, rate };
enum class Needs { nothing, gradients };

// A plan as the tensor holds it. Launches trust its addresses, so they take it only as one of the ops below has made it:
// of their state, whole, and with the table's size and the workspace that it was made for. What the table holds lies on the
// device, where nobody looks at it in time.
struct SavedPlan {
    char magic[8];
    char interface[sizeof OPLORA_CUDA_HASH];
    Kind kind;
    int64_t has_gradients; // as a measurement and a step need them
    int64_t device;        // -1: the CPU
    int64_t table_bytes, workspace_bytes;
    const void *workspace;
    oplora_cuda_plan plan;
    uint64_t hash; // of all before it
};

int64_t number_of(Place place) { return place.on_cuda ? place.device : -1; }

constexpr char MAGIC[8] = {'o', 'p', 'l', 'p', 'l', 'a', 'n', '1'};

// FNV-1a.
uint64_t hash_of(const SavedPlan &saved) {
    uint64_t hash = 0xcbf29ce484222325u;
    const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(&saved);
    for (size_t i = 0; i < offsetof(SavedPlan, hash); i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

Tensor save_plan(Kind kind, bool has_gradients, Place place, const Tensor &table, const Tensor &workspace,
                 const oplora_cuda_plan &made) {
    SavedPlan saved;
    std::memset(&saved, 0, sizeof saved); // padding is hashed too
    std::memcpy(saved.magic, MAGIC, sizeof MAGIC);
    std::memcpy(saved.interface, OPLORA_CUDA_HASH, sizeof saved.interface);
    saved.kind = kind;
    saved.has_gradients = has_gradients;
    saved.device = number_of(place);
    saved.table_bytes = table.numel();
    saved.workspace_bytes = workspace.numel();
    saved.workspace = workspace.const_data_ptr();
    std::memcpy(&saved.plan, &made, sizeof made);
    saved.hash = hash_of(saved);
    Tensor plan = bytes_on_cpu(sizeof saved);
    std::memcpy(out<char>(plan), &saved, sizeof saved);
    return plan;
}

oplora_cuda_plan read_plan(const char *op, Kind kind, Needs needs, Place place, const Tensor &plan, const Tensor &table,
                           const Tensor &workspace) {
    check(op, "plan", plan, ScalarType::Byte, sizeof(SavedPlan));
    check(op, "table", table, ScalarType::Byte, table.numel(), place);
    check(op, "workspace", workspace, ScalarType::Byte, workspace.numel(), place);
    SavedPlan saved;
    std::memcpy(&saved, plan.const_data_ptr(), sizeof saved);
    STD_TORCH_CHECK(!std::memcmp(saved.magic, MAGIC, sizeof MAGIC) && saved.hash == hash_of(saved) &&
                        !std::memcmp(saved.interface, OPLORA_CUDA_HASH, sizeof saved.interface),
                    "oplora::", op, ": plan is not what a plan op has returned");
    STD_TORCH_CHECK(saved.kind == kind, "oplora::", op, ": plan is that of another state");
    STD_TORCH_CHECK(saved.has_gradients || needs == Needs::nothing, "oplora::", op,
                    ": plan was made without gradients");
    STD_TORCH_CHECK(saved.device == number_of(place), "oplora::", op, ": plan is for another device than table is on");
    STD_TORCH_CHECK(saved.table_bytes == table.numel(), "oplora::", op, ": table has ", table.numel(),
                    " bytes, the plan's has ", saved.table_bytes);
    STD_TORCH_CHECK(saved.workspace_bytes == workspace.numel() && saved.workspace == workspace.const_data_ptr(),
                    "oplora::", op, ": workspace is not the plan's");
    return saved.plan;
}

// verdict (2): a plan writes what it finds there.
template <class L, class TableBytes, class WorkspaceBytes, class PlanLayers>
Plan make_plan(Kind kind, const Tensors &grads, L &layers, const DeviceNumbers &numbers,
               const std::vector<oplora_cuda_half> &halves, const Tensor &verdict, TableBytes table_bytes,
               WorkspaceBytes workspace_bytes, PlanLayers plan_layers) {
    const int64_t in_table = table_bytes(layers.layers.data(), layers.count());
    const int64_t in_workspace = workspace_bytes(layers.layers.data(), layers.count());
    STD_TORCH_CHECK(in_table >= 0 && in_workspace >= 0, "oplora::", layers.op, ": sizes or ranks that do not fit");
    Tensor table = bytes_on_cpu(in_table);
    Tensor workspace = torch::stable::new_empty(verdict, {&in_workspace, 1}, ScalarType::Byte);
    oplora_cuda_plan made = {};
    check(layers.op, "verdict", verdict, ScalarType::Int, 2, layers.place);
    check_core(layers.op, plan_layers(layers.layers.data(), layers.count(), numbers.adamw.data(), numbers.rates.data(),
                                      halves.data(), reinterpret_cast<oplora_cuda_verdict *>(out<int>(verdict)),
                                      out<char>(workspace), out<char>(table), &made));
    return {save_plan(kind, !grads.empty(), layers.place, table, workspace, made), table, workspace};
}

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

// call(plan, table, stream), for a plan that an op above returned.
template <class F>
void launch(const char *op, Kind kind, Needs needs, const Tensor &plan, const Tensor &table, const Tensor &workspace,
            F call) {
    const Place place = place_of(op, table);
    const oplora_cuda_plan planned = read_plan(op, kind, needs, place, plan, table, workspace);
    on_device(op, place, [&](void *stream) { return call(&planned, table.const_data_ptr(), stream); });
}

// A number of int32 on the device, or none.
const int *veto_of(const char *op, const std::optional<Tensor> &veto, const Tensor &table) {
    if (!veto) return nullptr;
    check(op, "veto", *veto, ScalarType::Int, 1, place_of(op, table));
    return in<int>(*veto);
}

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
    m.impl("find_rate_", TORCH_BOX(&find_rate_));
    STEP_IMPLEMENTATIONS(m);
}

// Of a view that negates or conjugates lazily torch hands over a copy, which is gone when the op returns: a plan would keep
// its address.
void refuse_lazy_views(StableIValue *, uint64_t, uint64_t) {
    STD_TORCH_CHECK(false,
                    "oplora: a plan keeps its tensors' addresses, and one of them is a lazily negated or conjugated "
                    "view; pass resolve_neg() or resolve_conj() of it");
}
#define REFUSE_LAZY_VIEWS(m) \
    m.impl("cuda_exact_plan", &refuse_lazy_views); \
    m.impl("cuda_lean_plan", &refuse_lazy_views); \
    m.impl("cuda_rate_plan", &refuse_lazy_views)
STABLE_TORCH_LIBRARY_IMPL(oplora, Negative, m) { REFUSE_LAZY_VIEWS(m); }
STABLE_TORCH_LIBRARY_IMPL(oplora, Conjugate, m) { REFUSE_LAZY_VIEWS(m); }

// for a library that executes kernels on the CPU; any other refuses CPU tensors
STABLE_TORCH_LIBRARY_IMPL(oplora, CPU, m) { STEP_IMPLEMENTATIONS(m); }
