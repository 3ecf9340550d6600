// The exact state's kernels against the C core, bit for bit: after every call parameters, moments, columns, factors, reports
// and step counts are the same. Runs on the CPU, as test_adamw_lean.cpp; argv[1] names the build.
#include "adamw_exact.h"
#include "sides.h"

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

// One side's memory: everything a step reads or writes.
struct Side : CommonSide<oplora_exact_f32> {
    std::vector<float> parameters, exp_avg, exp_avg_sq;
    std::vector<double> decay;
    std::vector<uint8_t> moving;

    auto state() const { return std::tie(parameters, exp_avg, exp_avg_sq, decay, moving, out); }

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
        add_factors(shape, shape.offset, 1e-3);
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

bool same_sides(const Side &core, const Side &device, std::string *where) {
    if (!same(core.report, device.report, "report", where) || !same(core.decay, device.decay, "decay", where) ||
        !same(core.moving, device.moving, "moving", where) ||
        !same(core.parameters, device.parameters, "parameters", where) ||
        !same(core.exp_avg, device.exp_avg, "exp_avg", where) ||
        !same(core.exp_avg_sq, device.exp_avg_sq, "exp_avg_sq", where))
        return false;
    return same_factors_and_steps(core, device, where);
}

// Both sides through the same calls.
struct Pair : CommonPair<Shape, Side> {
    explicit Pair(const Shape &s) : CommonPair(s) {
        if (halves.used())
            for (auto &f : device.factors) f.out = nullptr;
        const int64_t n = layers();
        take(oplora_exact_workspace_bytes_f32(core.layers.data(), n),
             oplora_cuda_exact_workspace_bytes(device.layers.data(), n),
             oplora_cuda_exact_table_bytes(device.layers.data(), n));
        check(oplora_cuda_exact_plan_layers(device.layers.data(), n, adamw.data(), rates.data(), halves.halves.data(),
                                            &verdict, workspace.begin, table.begin, &plan) == OPLORA_OK,
              shape.name + ": plan");
    }

    void compare(const char *what) {
        if (halves.used()) device.out = core.out; // which the device did not get
        CommonPair::compare(what);
    }

    void begin() { generate(); }
    void generate() {
        oplora_exact_generate_f32(core.layers.data(), plan.n_layers, scratch.begin, nullptr);
        check(oplora_cuda_exact_generate(&plan, table.begin, nullptr) == cudaSuccess, shape.name + ": generate runs");
        compare("generate");
    }

    void measure() {
        oplora_exact_measure_f32(core.layers.data(), plan.n_layers, scratch.begin, nullptr);
        check(oplora_cuda_exact_measure(&plan, table.begin, nullptr) == cudaSuccess, shape.name + ": measure runs");
        compare("measure");
    }

    int launch_step(int measured, const int *veto) {
        return oplora_cuda_exact_step(&plan, table.begin, measured, veto, nullptr);
    }

    void step(int measured = 0) {
        set_numbers();
        const oplora_status status =
            oplora_exact_step_f32(core.layers.data(), plan.n_layers, measured, scratch.begin, nullptr);
        for (auto &a : core.adamw) a.step += status == OPLORA_OK;
        check(launch_step(measured, nullptr) == cudaSuccess, shape.name + ": step runs");
        compare(measured ? "measured step" : "step");
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
        {"more columns than a block holds", 130, 2, F{{1100, false}, {519, true}}},
        {"bfloat16", 30, 128, F{{64, false}, {36, true}}, 1, 0, OPLORA_BF16},
        {"float16, tasks end inside", 5, 20, F{{2047, false}, {2049, true}}, 1, 0, OPLORA_F16},
        {"many layers", 4, 5, F{{8, false}, {4, false}}, slow ? 40 : 300},
    };
    for (const auto &shape : shapes) steps(shape, slow ? 1 : 3);
    for (const size_t i : {1, 2, 5, 7, 8, 10}) rates_differ(shapes[i]);
    if (!slow) {
        steps({"many tasks", 9, 6, F{{30001, false}, {4100, false}}}, 2);
        steps({"31 rows", 4, 3, F{{31, false}}}, 2);
        steps({"33 rows", 32, 3, F{{33, false}}}, 2);
        steps({"a million rows", 1, 1, F{{1000001, false}}}, 1);
        steps({"many tasks in vectors", 9, 6, F{{30000, false}, {4100, false}}}, 2);
    }
    for (const size_t i : {1, 2, 3, 5, 8}) large_gradients<Pair>(shapes[i]);
    nonfinite_changes_nothing<Pair>(shapes[2]);
    nonfinite_changes_nothing<Pair>(shapes[8]); // bfloat16
    nonfinite_changes_nothing<Pair>(shapes.back());
}

} // namespace

int main(int argc, char **argv) {
    return in_every_order(argc, argv, "exact state's kernels", run, [] {
        Side side({"bad", 4, 5, {{9, false}}});
        auto layers = side.layers;
        layers[0].moving = nullptr;
        refuses("a missing pointer is refused", OPLORA_ENULL, layers);
        layers = side.layers;
        layers[0].N = 10;
        refuses("rows that do not add up are refused", OPLORA_ESIZE, layers);
        side.factors[0].rows = layers[0].N = int64_t{1} << 44;
        refuses("more tasks than a grid has blocks are refused", OPLORA_EOVERFLOW, layers);
        layers[0].H = int64_t{1} << 19;
        refuses("H N beyond 2^63 is refused", OPLORA_ESIZE, layers);
    });
}
