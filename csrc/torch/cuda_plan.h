// A plan of csrc/cuda/plan.h as the tensors that its ops return and launches take.
#pragma once

#include <cstddef>
#include <cstring>
#include <tuple>

#include "cuda_library.h"
#include "states.h"

namespace {

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

} // namespace
