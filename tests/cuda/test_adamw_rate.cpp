// State rate's kernels against the C core, bit for bit: after every call what is generated, second moments, factors, reports
// and step counts are the same. Runs on the CPU, as test_adamw_lean.cpp; argv[1] names the build.
#include "adamw_rate.h"
#include "sides.h"

namespace {

struct FactorShape {
    int64_t rows;
    bool listens, based;
};

struct Shape {
    std::string name;
    std::vector<FactorShape> factors;
    int layers = 1, offset = 0;      // offset: numbers by which every array is shifted, to spoil its alignment
    oplora_dtype dtype = OPLORA_F32; // of the model's factors
};

// One side's memory: everything a step reads or writes.
struct Side : CommonSide<oplora_rate_f32> {
    std::vector<float> generated, exp_avg_sq;
    double found = 1e-3;

    auto state() const { return std::tie(generated, exp_avg_sq, out); }

    explicit Side(const Shape &shape) {
        int64_t N = 0;
        for (const auto &f : shape.factors) N += f.rows;
        const int64_t n = shape.layers, o = shape.offset;
        std::mt19937 random{3};
        std::normal_distribution<float> normal(0, 0.1f);
        generated.resize(count(n * N + o));
        exp_avg_sq.resize(count(n * N + o));
        report.resize(count(n * OPLORA_RATE_REPORT), -1);
        for (auto &v : generated) v = normal(random);
        add_factors(shape, o, 1);
        for (auto &a : adamw) a.beta2 = 0.99;
        for (size_t i = 0, row = 0; i < out.size(); row += count(factors[i++].rows)) {
            for (size_t k = 0; k < count(factors[i].rows); k++) out[i][k + count(o)] = generated[row + k + count(o)];
            factors[i].listens = shape.factors[i % shape.factors.size()].listens;
        }
        for (int64_t i = 0; i < n; i++)
            layers.push_back({N, generated.data() + i * N + o, exp_avg_sq.data() + i * N + o,
                              factors.data() + count(i) * shape.factors.size(),
                              static_cast<int64_t>(shape.factors.size()), adamw[count(i)], 0,
                              report.data() + i * OPLORA_RATE_REPORT});
    }
};

bool same_sides(const Side &core, const Side &device, std::string *where) {
    if (!same(core.report, device.report, "report", where) ||
        !same(core.generated, device.generated, "generated", where) ||
        !same(core.exp_avg_sq, device.exp_avg_sq, "exp_avg_sq", where))
        return false;
    return same_factors_and_steps(core, device, where);
}

// Both sides through the same calls.
struct Pair : CommonPair<Shape, Side> {
    explicit Pair(const Shape &s) : CommonPair(s) {
        for (size_t f = 0; halves.used() && f < device.out.size(); f++)
            for (size_t i = 0; i < device.out[f].size(); i++) halves.out[f][i] = to_half(device.out[f][i], s.dtype);
        const int64_t n = layers();
        set_numbers();
        take(oplora_rate_workspace_bytes_f32(core.layers.data(), n),
             oplora_cuda_rate_workspace_bytes(device.layers.data(), n),
             oplora_cuda_rate_table_bytes(device.layers.data(), n));
        check(oplora_cuda_rate_plan_layers(device.layers.data(), n, adamw.data(), rates.data(), &device.found,
                                           halves.halves.data(), &verdict, workspace.begin, table.begin,
                                           &plan) == OPLORA_OK,
              shape.name + ": plan");
    }

    void set_numbers() {
        CommonPair::set_numbers();
        for (auto &l : core.layers) l.rate = core.found;
    }

    void measure() {
        set_numbers();
        const oplora_status status = oplora_rate_measure_f32(core.layers.data(), plan.n_layers, scratch.begin, nullptr);
        check(oplora_cuda_rate_measure(&plan, table.begin, nullptr) == cudaSuccess, shape.name + ": measure runs");
        check(verdict.nonfinite == (status == OPLORA_ENONFINITE), shape.name + ": the verdict of a measurement");
        compare("measure");
    }

    int launch_step(int, const int *veto) { return oplora_cuda_rate_step(&plan, table.begin, veto, nullptr); }

    // What starts is what the sides are made with; every step follows a measurement.
    void begin() {}
    void step(int = 0) {
        set_numbers();
        const oplora_status status = oplora_rate_step_f32(core.layers.data(), plan.n_layers, scratch.begin, nullptr);
        for (auto &a : core.adamw) a.step += status == OPLORA_OK;
        check(launch_step(0, nullptr) == cudaSuccess, shape.name + ": step runs");
        check(verdict.nonfinite == (status == OPLORA_ENONFINITE), shape.name + ": the verdict of a step");
        compare("step");
    }
};

void steps(const Shape &shape, int n) {
    Pair pair(shape);
    for (int i = 0; i < n; i++) {
        pair.gradients(i % 2 ? 1e-2f : 1.f);
        pair.measure();
        pair.each_side([&](Side &side) { // as the search does
            side.found *= i % 2 ? 0.5 : 2.014;
            for (size_t f = 0; f < side.factors.size(); f++) { // and a schedule
                side.rates[2 * f] = 1 - 0.3 * static_cast<double>(f % 3);
                side.rates[2 * f + 1] = f % 2 ? 0 : 0.1 * i;
            }
        });
        pair.step();
    }
    pair.gradients(1e-24f); // squares that are subnormal
    pair.measure();
    pair.step();
    pair.each_side([](Side &side) { side.found = 0; });
    pair.measure();
    pair.step();
}

void edits_of_16_bits_are_gone_on_from(const Shape &shape) {
    Pair pair(shape);
    for (int i = 0; i < 2; i++) {
        pair.gradients(1.f);
        pair.measure();
        pair.step();
    }
    for (size_t f = 0, row = 0; f < pair.core.out.size(); row += pair.core.out[f++].size())
        for (size_t k = f; k < pair.core.out[f].size(); k += 3) {
            pair.halves.out[f][k] = to_half(2 * pair.core.out[f][k] + 1, shape.dtype);
            pair.core.out[f][k] = from_half(pair.halves.out[f][k], shape.dtype);
            pair.core.generated[row + k] = pair.core.out[f][k];
        }
    pair.gradients(1.f);
    pair.set_numbers();
    oplora_rate_measure_f32(pair.core.layers.data(), pair.plan.n_layers, pair.scratch.begin, nullptr);
    check(oplora_cuda_rate_measure(&pair.plan, pair.table.begin, nullptr) == cudaSuccess,
          shape.name + ": measure runs");
    std::string where;
    check(same(pair.core.report, pair.device.report, "report", &where), shape.name + ": edited: " + where);
    pair.step();
    pair.measure();
}

void finds_the_cores_rate(int64_t layers) {
    std::mt19937 random(3);
    std::normal_distribution<double> normal(-0.5);
    std::vector<double> core = {1e-4, 0, 0, 0, 0, 0.7, 0}, device = core, heard(static_cast<size_t>(3 * layers));
    const std::string name = "the rate of " + std::to_string(layers) + " layers";
    for (int step = 0; step < 200; step++) {
        for (double &x : heard) x = normal(random);
        for (size_t i = 1; i < heard.size(); i += 3) heard[i] = std::fabs(heard[i]);
        check(oplora_find_rate(core.data(), heard.data(), layers) == OPLORA_OK, name);
        const int veto = 0;
        check(oplora_cuda_find_rate(device.data(), heard.data(), layers, step % 2 ? &veto : nullptr, nullptr) ==
                  cudaSuccess,
              name + " runs");
        check(std::memcmp(core.data(), device.data(), core.size() * sizeof(double)) == 0,
              name + " has the core's bits");
    }
    const int veto = 1;
    oplora_cuda_find_rate(device.data(), heard.data(), layers, &veto, nullptr);
    check(core == device, name + ": a vetoed step tells nothing");
}

// Each layer by the rate that it names, over the highest of the groups; a name of no rate reads none.
void hears_every_layer(int64_t layers) {
    std::mt19937 random(5);
    std::normal_distribution<double> normal;
    constexpr int64_t FACTORS = 7, GROUPS = 3;
    std::vector<double> reports(count(OPLORA_RATE_REPORT * layers)), rates(count(2 * FACTORS)),
        groups(count(7 * GROUPS));
    for (auto *numbers : {&reports, &rates, &groups})
        for (double &x : *numbers) x = normal(random);
    groups[0] = 0.5, groups[7] = 2, groups[14] = 1;
    std::vector<int64_t> listening(count(layers));
    for (size_t i = 0; i < listening.size(); i++) listening[i] = static_cast<int64_t>(3 * i) % (FACTORS + 1);
    std::vector<double> heard(count(3 * layers), -1);
    const std::string name = "what " + std::to_string(layers) + " layers tell";
    check(oplora_cuda_rate_heard(reports.data(), layers, rates.data(), FACTORS, listening.data(), groups.data(), GROUPS,
                                 heard.data(), nullptr) == cudaSuccess,
          name + " runs");
    for (size_t i = 0; i < count(layers); i++) {
        const double *const report = reports.data() + OPLORA_RATE_REPORT * i;
        const double lr = listening[i] < FACTORS ? rates[2 * count(listening[i])] : 0;
        check(heard[3 * i] == report[2] && heard[3 * i + 1] == report[3] * (lr / 2) && heard[3 * i + 2] == report[4],
              name);
    }
}

void refuses(const char *what, oplora_status expected, const std::vector<oplora_rate_f32> &layers) {
    oplora_cuda_plan plan;
    std::vector<char> memory(1 << 16);
    oplora_adamw numbers = {}, *adamw = &numbers;
    const double factors[4] = {}, *rates = factors, found = 1;
    oplora_cuda_verdict verdict = {};
    check(oplora_cuda_rate_plan_layers(layers.data(), static_cast<int64_t>(layers.size()), &adamw, &rates, &found,
                                       nullptr, &verdict, memory.data(), memory.data(), &plan) == expected,
          what);
    if (expected != OPLORA_ESIZE) return;
    check(oplora_cuda_rate_workspace_bytes(layers.data(), static_cast<int64_t>(layers.size())) == -1, what);
    check(oplora_cuda_rate_table_bytes(layers.data(), static_cast<int64_t>(layers.size())) == -1, what);
}

void run(bool slow) {
    for (const int64_t layers : {0, 1, 7, 300}) finds_the_cores_rate(layers);
    for (const int64_t layers : {0, 1, 33, 300}) hears_every_layer(layers);
    using F = std::vector<FactorShape>;
    const std::vector<Shape> shapes = {
        {"one entry", F{{1, true, false}}},
        {"odd", F{{31, false, false}, {33, true, true}}},
        {"vectors", F{{64, false, false}, {36, true, true}}},
        {"vectors that are not aligned", F{{64, true, false}, {36, true, true}}, 1, 1},
        {"a factor that begins inside a vector", F{{62, false, false}, {66, true, false}}},
        {"tasks end inside", F{{2047, true, false}, {2049, true, true}}},
        {"nothing that listens", F{{64, false, false}, {36, false, true}}},
        {"bfloat16", F{{64, false, false}, {36, true, true}}, 1, 0, OPLORA_BF16},
        {"float16, tasks end inside", F{{2047, true, false}, {2049, true, true}}, 1, 0, OPLORA_F16},
        {"many layers", F{{8, false, false}, {4, true, false}}, slow ? 40 : 300},
    };
    for (const auto &shape : shapes) steps(shape, slow ? 2 : 4);
    if (!slow) {
        steps({"many tasks", F{{30001, true, false}, {4100, true, true}}}, 2);
        steps({"many tasks in vectors", F{{30000, true, false}, {4100, true, true}}}, 2);
        steps({"a million entries", F{{1000001, true, false}}}, 1);
    }
    edits_of_16_bits_are_gone_on_from(shapes[7]);
    edits_of_16_bits_are_gone_on_from(shapes[8]);
    for (const size_t i : {1, 2, 3, 5, 7}) large_gradients<Pair>(shapes[i]);
    nonfinite_changes_nothing<Pair>(shapes[2]);
    nonfinite_changes_nothing<Pair>(shapes[7]); // bfloat16
    nonfinite_changes_nothing<Pair>(shapes.back());
}

} // namespace

int main(int argc, char **argv) {
    return in_every_order(argc, argv, "state rate's kernels", run, [] {
        Side side({"bad", {{9, true, false}}});
        auto layers = side.layers;
        layers[0].exp_avg_sq = nullptr;
        refuses("a missing pointer is refused", OPLORA_ENULL, layers);
        layers = side.layers;
        layers[0].N = 10;
        refuses("rows that do not add up are refused", OPLORA_ESIZE, layers);
        side.factors[0].rows = layers[0].N = int64_t{1} << 44;
        refuses("more tasks than a grid has blocks are refused", OPLORA_EOVERFLOW, layers);
        side.factors[0].rows = 9;
        layers = side.layers;
        side.factors[0].out = nullptr;
        refuses("a factor without its value is refused", OPLORA_ENULL, layers);
    });
}
