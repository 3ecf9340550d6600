// What the tests of the states' kernels share: the core and the device as two sides, each with memory of its own, that go
// through the same calls.
#pragma once

#include "halves.h"
#include "kernel_check.h"

#include <cmath>
#include <limits>
#include <new>
#include <random>
#include <tuple>

#include <sys/mman.h>
#include <unistd.h>

inline size_t count(int64_t n) { return static_cast<size_t>(n); }

// One side's memory: what every state has. Layer is the core's struct.
template <class Layer> struct CommonSide {
    std::vector<double> report;
    std::vector<std::vector<float>> gradients, bases, out;
    std::vector<oplora_factor_f32> factors;
    std::vector<Layer> layers;
    std::vector<oplora_adamw> adamw; // of steps done
    std::vector<double> rates;       // of every factor: lr, weight_decay

    // Factors of a shape's layers, each array shifted by `offset` numbers, which spoils its alignment.
    template <class Shape> void add_factors(const Shape &shape, int64_t offset, double lr) {
        adamw.resize(count(shape.layers), {2, 5e-4, 0.9, 0.999, 1e-8, 0.1, 0});
        for (int i = 0; i < shape.layers; i++)
            for (const auto &f : shape.factors) {
                gradients.emplace_back(count(f.rows + offset));
                bases.emplace_back(count(f.based ? f.rows + offset : 0), 0.25f);
                out.emplace_back(count(f.rows + offset));
                rates.insert(rates.end(), {lr, 0.1});
            }
        for (size_t i = 0; i < out.size(); i++) {
            const auto &f = shape.factors[i % shape.factors.size()];
            oplora_factor_f32 factor = {};
            factor.rows = f.rows, factor.g = gradients[i].data() + offset, factor.out = out[i].data() + offset;
            factor.base = f.based ? bases[i].data() + offset : nullptr;
            factors.push_back(factor);
        }
    }
};

template <class Side> bool same_factors_and_steps(const Side &core, const Side &device, std::string *where) {
    for (size_t f = 0; f < core.out.size(); f++)
        if (!same(core.out[f], device.out[f], ("factor " + std::to_string(f)).c_str(), where)) return false;
    for (size_t i = 0; i < core.adamw.size(); i++)
        if (core.adamw[i].step != device.adamw[i].step) {
            *where = "step of layer " + std::to_string(i);
            return false;
        }
    return true;
}

// Memory that ends before a page that nobody may touch: a byte beyond what a workspace or a table is said to take shows.
class Guarded {
  public:
    Guarded() = default;
    Guarded(const Guarded &) = delete;
    Guarded &operator=(const Guarded &) = delete;
    ~Guarded() {
        if (memory) munmap(memory, room + page());
    }

    // bytes, which must be a multiple of 64, all of them holding `value`.
    void take(int64_t bytes, char value) {
        check(bytes >= 0 && bytes % 64 == 0, "a size that can be aligned");
        room = (count(bytes) + page() - 1) / page() * page();
        void *const mapped = mmap(nullptr, room + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        memory = static_cast<char *>(mapped);
        check(mprotect(memory + room, page(), PROT_NONE) == 0, "a page is guarded");
        std::memset(memory, value, room);
        begin = memory + room - bytes;
    }

    char *begin = nullptr;

  private:
    static size_t page() { return count(sysconf(_SC_PAGESIZE)); }

    char *memory = nullptr;
    size_t room = 0;
};

// Both sides. A state's Pair adds its plan and its calls: begin(), measure(), step(measured) and launch_step(measured, veto);
// same_sides(core, device, &where) and Side::state(), what a step writes, are the state's too.
template <class Shape, class Side> struct CommonPair {
    Shape shape;
    Side core, device;
    Guarded scratch, table, workspace;
    oplora_cuda_plan plan;
    Halves halves;
    oplora_cuda_verdict verdict = {};
    std::vector<oplora_adamw *> adamw;
    std::vector<const double *> rates;
    std::mt19937 random{7};

    explicit CommonPair(const Shape &s) : shape(s), core(s), device(s), halves(device.factors, s.dtype) {
        for (auto &a : device.adamw) adamw.push_back(&a);
        for (size_t i = 0; i < device.layers.size(); i++)
            rates.push_back(device.rates.data() + 2 * i * shape.factors.size());
        if (halves.used())
            for (auto &f : device.factors) f.g = nullptr;
    }

    int64_t layers() const { return static_cast<int64_t>(core.layers.size()); }

    // What a device hands out holds anything.
    void take(int64_t core_bytes, int64_t workspace_bytes, int64_t table_bytes) {
        scratch.take(core_bytes, 0);
        workspace.take(workspace_bytes, '\x7f');
        table.take(table_bytes, 0);
    }

    void compare(const char *what) {
        std::string where;
        check(same_sides(core, device, &where), shape.name + ": " + what + ": " + where);
        check(halves.holds(core.out), shape.name + ": " + what + ": rounded factors");
    }

    void gradients(float scale) {
        std::normal_distribution<float> normal(0, scale);
        for (size_t f = 0; f < core.gradients.size(); f++)
            for (size_t i = 0; i < core.gradients[f].size(); i++)
                core.gradients[f][i] = device.gradients[f][i] = normal(random);
        halves.round(core.gradients);
    }

    // What the core has by value and the kernels read on the device.
    void set_numbers() {
        for (size_t i = 0; i < core.layers.size(); i++) {
            core.layers[i].adamw = core.adamw[i];
            core.layers[i].adamw.step++;
        }
        for (size_t f = 0; f < core.factors.size(); f++) {
            core.factors[f].lr = core.rates[2 * f];
            core.factors[f].weight_decay = core.rates[2 * f + 1];
        }
    }

    template <class Set> void each_side(Set set) {
        set(core);
        set(device);
    }
    template <class Set> void each_layer(Set set) {
        each_side([&](Side &side) {
            for (auto &l : side.layers) set(l);
        });
    }
    template <class Set> void each_rates(Set set) {
        each_side([&](Side &side) {
            for (size_t f = 0; f < side.factors.size(); f++)
                set(f % shape.factors.size(), side.rates[2 * f], side.rates[2 * f + 1]);
        });
    }
    template <class Set> void each_adamw(Set set) {
        each_side([&](Side &side) {
            for (auto &a : side.adamw) set(a);
        });
    }
};

// Also beyond the largest gradient that counts, among others and after them.
template <class Pair, class Shape> void large_gradients(const Shape &shape) {
    Pair pair(shape);
    pair.begin();
    for (const float scale : {3e37f, 1.f, 5e18f, 1e30f, 1e-2f}) {
        pair.gradients(scale);
        pair.measure();
        pair.step(scale == 1e30f);
    }
}

template <class Pair, class Shape> void nonfinite_changes_nothing(const Shape &shape) {
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
        Pair pair(shape);
        pair.begin();
        pair.gradients(1.f);
        pair.measure();
        pair.step(0);
        pair.core.gradients.back().back() = pair.device.gradients.back().back() = bad;
        pair.halves.round(pair.core.gradients);
        const auto before = pair.device;
        pair.measure();
        pair.step(0);
        check(pair.device.layers.back().report[1] == 1, shape.name + ": counted");
        check(before.state() == pair.device.state() && before.adamw[0].step == pair.device.adamw[0].step,
              shape.name + ": a gradient that is not finite changes nothing");
        pair.gradients(1.f);
        pair.measure();
        pair.step(0);
        pair.measure();
        const auto good = pair.device;
        const int veto = 1;
        check(pair.launch_step(0, &veto) == cudaSuccess, shape.name + ": a vetoed step runs");
        check(good.state() == pair.device.state() && good.adamw[0].step == pair.device.adamw[0].step &&
                  pair.verdict.nonfinite == 1,
              shape.name + ": a vetoed step changes nothing");
        check(pair.verdict.refused == 2, shape.name + ": refused steps are counted");
        pair.step(0); // no veto any more
    }
}
