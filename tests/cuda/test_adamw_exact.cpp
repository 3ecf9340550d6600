// The exact state's kernels against the C core, bit for bit: after every call parameters, moments, columns, factors, reports
// and step counts are the same. Runs on the CPU, as test_adamw_lean.cpp; argv[1] names the build.
#include "adamw_exact.h"
#include "cuda_on_cpu.h"
#include "halves.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static int failures = 0, checks = 0;
static void check(bool good, const std::string &what) {
    checks++;
    if (!good) failures++, printf("FAILED: %s\n", what.c_str());
}

namespace {

struct FactorShape {
    int64_t rows;
    bool based;
};

struct Shape {
    std::string name;
    int64_t H, Z;
    std::vector<FactorShape> factors;
    int layers = 1, offset = 0;      // offset: numbers by which every array is shifted, to spoil its alignment
    oplora_dtype dtype = OPLORA_F32; // of the model's factors
};

size_t count(int64_t n) { return static_cast<size_t>(n); }

// One side's memory: everything a step reads or writes.
struct Side {
    std::vector<float> parameters, exp_avg, exp_avg_sq;
    std::vector<double> decay, report;
    std::vector<uint8_t> moving;
    std::vector<std::vector<float>> gradients, bases, out;
    std::vector<oplora_factor_f32> factors;
    std::vector<oplora_exact_f32> layers;
    std::vector<oplora_adamw> adamw; // of steps done
    std::vector<double> rates;       // of every factor: lr, weight_decay

    explicit Side(const Shape &shape) {
        int64_t N = 0;
        for (const auto &f : shape.factors) N += f.rows;
        const int64_t size = (oplora_size(shape.H, shape.Z, N) + 3) / 4 * 4; // every layer is aligned as the first
        const int64_t n = shape.layers, reports = oplora_exact_report_size(shape.H);
        for (auto *v : {&parameters, &exp_avg, &exp_avg_sq}) v->resize(count(n * size + shape.offset));
        const int64_t n_factors = static_cast<int64_t>(shape.factors.size());
        decay.resize(count(n * n_factors * shape.H), 1);
        moving.resize(count(n * shape.H));
        report.resize(count(n * reports), -1);
        adamw.resize(count(n), {2, 5e-4, 0.9, 0.999, 1e-8, 0.1, 0});
        for (int64_t i = 0; i < n; i++)
            for (const auto &f : shape.factors) {
                gradients.emplace_back(count(f.rows + shape.offset));
                bases.emplace_back(count(f.based ? f.rows + shape.offset : 0), 0.25f);
                out.emplace_back(count(f.rows + shape.offset));
            }
        for (size_t i = 0; i < gradients.size(); i++) rates.insert(rates.end(), {1e-3, 0.1});
        for (size_t i = 0; i < gradients.size(); i++) {
            const auto &f = shape.factors[i % shape.factors.size()];
            factors.push_back({f.rows, gradients[i].data() + shape.offset,
                               f.based ? bases[i].data() + shape.offset : nullptr, out[i].data() + shape.offset, 0, 0,
                               0, 0});
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = i * size + shape.offset;
            layers.push_back({shape.H, shape.Z, N, parameters.data() + at, exp_avg.data() + at, exp_avg_sq.data() + at,
                              decay.data() + i * n_factors * shape.H, moving.data() + i * shape.H,
                              factors.data() + count(i) * shape.factors.size(),
                              static_cast<int64_t>(shape.factors.size()), adamw[count(i)],
                              report.data() + i * reports});
            const oplora_rows random = {0, shape.factors[0].rows};
            oplora_start_f32(layers.back().parameters, shape.H, shape.Z, N, 17, static_cast<uint32_t>(i), 0.01,
                             OPLORA_UNIFORM, &random, 1, nullptr);
        }
    }
};

template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b, const char *name, std::string *where) {
    for (size_t i = 0; i < a.size(); i++)
        if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
            char text[200];
            snprintf(text, sizeof text, "%s[%zu of %zu] is %.9g, the core's %.9g", name, i, a.size(),
                     static_cast<double>(b[i]), static_cast<double>(a[i]));
            *where = text;
            return false;
        }
    return true;
}

bool same_sides(const Side &core, const Side &device, std::string *where) {
    if (!same(core.report, device.report, "report", where) || !same(core.decay, device.decay, "decay", where) ||
        !same(core.moving, device.moving, "moving", where) ||
        !same(core.parameters, device.parameters, "parameters", where) ||
        !same(core.exp_avg, device.exp_avg, "exp_avg", where) ||
        !same(core.exp_avg_sq, device.exp_avg_sq, "exp_avg_sq", where))
        return false;
    for (size_t f = 0; f < core.out.size(); f++)
        if (!same(core.out[f], device.out[f], ("factor " + std::to_string(f)).c_str(), where)) return false;
    for (size_t i = 0; i < core.adamw.size(); i++)
        if (core.adamw[i].step != device.adamw[i].step) {
            *where = "step of layer " + std::to_string(i);
            return false;
        }
    return true;
}

// Both sides through the same calls.
struct Pair {
    Shape shape;
    Side core, device;
    std::vector<char> scratch, table, workspace;
    oplora_cuda_plan plan;
    Halves halves;
    oplora_cuda_verdict verdict = {};
    std::vector<oplora_adamw *> adamw;
    std::vector<const double *> rates;
    std::mt19937 random{7};

    explicit Pair(const Shape &s) : shape(s), core(s), device(s), halves(device.factors, s.dtype) {
        for (auto &a : device.adamw) adamw.push_back(&a);
        for (size_t i = 0; i < device.layers.size(); i++)
            rates.push_back(device.rates.data() + 2 * i * shape.factors.size());
        if (halves.used())
            for (auto &f : device.factors) f.g = nullptr, f.out = nullptr;
        const auto n = static_cast<int64_t>(core.layers.size());
        scratch.resize(count(oplora_exact_workspace_bytes_f32(core.layers.data(), n)) + 64);
        // what a device hands out holds anything
        workspace.assign(count(oplora_cuda_exact_workspace_bytes(device.layers.data(), n)) + 64, '\x7f');
        table.resize(count(oplora_cuda_exact_table_bytes(device.layers.data(), n)) + 64);
        check(oplora_cuda_exact_plan_layers(device.layers.data(), n, adamw.data(), rates.data(), halves.halves.data(),
                                            &verdict, aligned(workspace), aligned(table), &plan) == OPLORA_OK,
              shape.name + ": plan");
    }

    static void *aligned(std::vector<char> &memory) {
        return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    }

    void compare(const char *what) {
        std::string where;
        if (halves.used()) device.out = core.out; // which the device did not get
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

    void generate() {
        oplora_exact_generate_f32(core.layers.data(), plan.n_layers, aligned(scratch), nullptr);
        check(oplora_cuda_exact_generate(&plan, aligned(table), nullptr) == cudaSuccess,
              shape.name + ": generate runs");
        compare("generate");
    }

    void measure() {
        oplora_exact_measure_f32(core.layers.data(), plan.n_layers, aligned(scratch), nullptr);
        check(oplora_cuda_exact_measure(&plan, aligned(table), nullptr) == cudaSuccess, shape.name + ": measure runs");
        compare("measure");
    }

    void step(int measured = 0) {
        for (size_t i = 0; i < core.layers.size(); i++) {
            core.layers[i].adamw = core.adamw[i];
            core.layers[i].adamw.step++;
        }
        for (size_t f = 0; f < core.factors.size(); f++) {
            core.factors[f].lr = core.rates[2 * f];
            core.factors[f].weight_decay = core.rates[2 * f + 1];
        }
        const oplora_status status =
            oplora_exact_step_f32(core.layers.data(), plan.n_layers, measured, aligned(scratch), nullptr);
        for (auto &a : core.adamw) a.step += status == OPLORA_OK;
        check(oplora_cuda_exact_step(&plan, aligned(table), measured, nullptr, nullptr) == cudaSuccess,
              shape.name + ": step runs");
        compare(measured ? "measured step" : "step");
    }

    template <class Set> void each_layer(Set set) {
        for (auto *side : {&core, &device})
            for (auto &l : side->layers) set(l);
    }
    template <class Set> void each_rates(Set set) {
        for (auto *side : {&core, &device})
            for (size_t f = 0; f < side->factors.size(); f++)
                set(f % shape.factors.size(), side->rates[2 * f], side->rates[2 * f + 1]);
    }
    template <class Set> void each_adamw(Set set) {
        for (auto *side : {&core, &device})
            for (auto &a : side->adamw) set(a);
    }
};

float *c1_of(const oplora_exact_f32 &l) { return l.parameters + l.H * l.N + l.N + l.H * l.Z; }

void steps(const Shape &shape, int n) {
    Pair pair(shape);
    pair.generate();
    for (int i = 0; i < n; i++) {
        pair.gradients(i % 2 ? 1e-2f : 1.f);
        pair.step();
    }
    for (const float to : {-1.f, 1.f}) { // units die, owe weight decay or move on, and return
        pair.each_layer([&](oplora_exact_f32 &l) {
            for (int64_t j = 0; j < l.H; j += 2) c1_of(l)[j] = to;
        });
        pair.gradients(1.f);
        pair.step();
        pair.step();
    }
    pair.each_adamw([](oplora_adamw &a) { a.hidden_lr = 0, a.weight_decay = 0; });
    pair.each_rates([](size_t, double &lr, double &decay) { lr = 3e-2, decay = 0; });
    pair.gradients(1e-3f);
    pair.measure();
    for (auto *side : {&pair.core, &pair.device}) { // as clipping does
        for (auto &l : side->layers) {
            l.report[0] *= 0.25;
            for (int64_t j = 0; j < l.H; j++) l.report[3 + l.H + j] *= 0.5;
        }
        for (auto &gradient : side->gradients)
            for (auto &g : gradient) g *= 0.5f;
    }
    pair.halves.round(pair.core.gradients);
    pair.step(1);
    pair.each_layer([](oplora_exact_f32 &l) {
        for (int64_t j = 0; j < l.H; j++) c1_of(l)[j] = -2;
    });
    pair.step(); // all are off
    pair.generate();
}

// As steps, with a rate and a decay to each factor that change between steps of one plan, also to 0.
void rates_differ(const Shape &shape) {
    Pair pair(shape);
    pair.generate();
    for (int i = 0; i < 4; i++) {
        pair.each_rates([&](size_t f, double &lr, double &decay) {
            lr = (i + static_cast<int>(f)) % 3 == 2 ? 0 : 1e-3 * static_cast<double>(1 + 15 * f);
            decay = f ? 0.05 : 0.5 * i;
        });
        pair.gradients(1.f);
        pair.each_layer([&](oplora_exact_f32 &l) { // some units are off for a while
            for (int64_t j = 0; j < l.H; j += 3) c1_of(l)[j] = i < 2 ? -1.f : 1.f;
        });
        pair.step();
    }
    pair.generate();
}

// Also beyond the largest gradient that counts, among others and after them.
void large_gradients(const Shape &shape) {
    Pair pair(shape);
    pair.generate();
    for (const float scale : {3e37f, 1.f, 5e18f, 1e30f, 1e-2f}) {
        pair.gradients(scale);
        pair.measure();
        pair.step(scale == 1e30f);
    }
}

void nonfinite_changes_nothing(const Shape &shape) {
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
        Pair pair(shape);
        pair.gradients(1.f);
        pair.step();
        pair.core.gradients.back().back() = pair.device.gradients.back().back() = bad;
        pair.halves.round(pair.core.gradients);
        const Side before = pair.device;
        pair.step();
        check(pair.device.layers.back().report[1] == 1, shape.name + ": counted");
        check(before.parameters == pair.device.parameters && before.exp_avg == pair.device.exp_avg &&
                  before.out == pair.device.out && before.adamw[0].step == pair.device.adamw[0].step,
              shape.name + ": a gradient that is not finite changes nothing");
        pair.measure();
        pair.gradients(1.f);
        pair.step();
        const Side good = pair.device;
        const int veto = 1;
        check(oplora_cuda_exact_step(&pair.plan, Pair::aligned(pair.table), 0, &veto, nullptr) == cudaSuccess,
              shape.name + ": a vetoed step runs");
        check(good.parameters == pair.device.parameters && good.out == pair.device.out &&
                  good.adamw[0].step == pair.device.adamw[0].step && pair.verdict.nonfinite == 1,
              shape.name + ": a vetoed step changes nothing");
        check(pair.verdict.refused == 2, shape.name + ": refused steps are counted");
    }
}

void refuses(const char *what, oplora_status expected, const std::vector<oplora_exact_f32> &layers) {
    oplora_cuda_plan plan;
    std::vector<char> memory(1 << 16);
    oplora_adamw numbers = {}, *adamw = &numbers;
    const double factors[4] = {}, *rates = factors;
    oplora_cuda_verdict verdict = {};
    check(oplora_cuda_exact_plan_layers(layers.data(), static_cast<int64_t>(layers.size()), &adamw, &rates, nullptr,
                                        &verdict, memory.data(), memory.data(), &plan) == expected,
          what);
}

void run(bool slow) {
    using F = std::vector<FactorShape>;
    const std::vector<Shape> shapes = {
        {"one row", 1, 1, F{{1, false}}},
        {"odd", 4, 7, F{{31, false}, {33, true}}},
        {"vectors", 30, 128, F{{64, false}, {36, true}}},
        {"vectors that are not aligned", 30, 128, F{{64, false}, {36, true}}, 1, 1},
        {"a factor that begins inside a vector", 32, 9, F{{62, false}, {66, false}}},
        {"tasks end inside", 5, 20, F{{2047, false}, {2049, true}}},
        {"wide", 768, 5, F{{24, false}, {16, false}}},
        {"bfloat16", 30, 128, F{{64, false}, {36, true}}, 1, 0, OPLORA_BF16},
        {"float16, tasks end inside", 5, 20, F{{2047, false}, {2049, true}}, 1, 0, OPLORA_F16},
        {"many layers", 4, 5, F{{8, false}, {4, false}}, slow ? 40 : 300},
    };
    for (const auto &shape : shapes) steps(shape, slow ? 1 : 3);
    for (const size_t i : {1, 2, 5, 7, 9}) rates_differ(shapes[i]);
    if (!slow) {
        steps({"many tasks", 9, 6, F{{30001, false}, {4100, false}}}, 2);
        steps({"31 rows", 4, 3, F{{31, false}}}, 2);
        steps({"33 rows", 32, 3, F{{33, false}}}, 2);
        steps({"a million rows", 1, 1, F{{1000001, false}}}, 1);
        steps({"many tasks in vectors", 9, 6, F{{30000, false}, {4100, false}}}, 2);
    }
    for (const size_t i : {1, 2, 3, 5, 7}) large_gradients(shapes[i]);
    nonfinite_changes_nothing(shapes[2]);
    nonfinite_changes_nothing(shapes[7]); // bfloat16
    nonfinite_changes_nothing(shapes.back());
}

} // namespace

int main(int argc, char **argv) {
    const std::string kind = argc > 1 ? argv[1] : "values";
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040); // nvcc -ftz=true, and what the core does around its own loops
#endif
    using cuda_on_cpu::Order;
    for (const Order order : {Order::forward, Order::reverse, Order::random}) {
        cuda_on_cpu::options.order = order;
        run(kind != "values");
    }
    Side side({"bad", 4, 5, {{9, false}}});
    auto layers = side.layers;
    layers[0].moving = nullptr;
    refuses("a missing pointer is refused", OPLORA_ENULL, layers);
    layers = side.layers;
    layers[0].N = 10;
    refuses("rows that do not add up are refused", OPLORA_ESIZE, layers);
    printf("exact state's kernels, %s: %d passed, %d failed\n", kind.c_str(), checks - failures, failures);
    return failures != 0;
}
