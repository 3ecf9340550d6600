// The lean step's kernels against the C core, bit for bit: after every call all of the state, the factors, the reports and
// the step counts are the same. Runs on the CPU, in the three builds and the three orders of threads that
// cuda_on_cpu/README.md describes; argv[1] names the build.
#include "adamw_lean.h"
#include "sides.h"

namespace {

struct FactorShape {
    int64_t rows;
    bool random, based;
};

struct Shape {
    std::string name;
    int64_t H, Z, d, k;
    oplora_start_kind start;
    std::vector<FactorShape> factors;
    int layers = 1;
    oplora_dtype dtype = OPLORA_F32; // of the model's factors
};

// One side's memory: everything a step reads or writes.
struct Side : CommonSide<oplora_lean_f32> {
    std::vector<float> numbers;
    std::vector<uint16_t> moments;
    std::vector<double> scalars, dh;

    auto state() const { return std::tie(numbers, moments, scalars, out); }

    explicit Side(const Shape &shape) {
        int64_t N = 0;
        for (const auto &f : shape.factors) N += f.rows;
        const int64_t numbers_each = oplora_lean_numbers(shape.H, shape.Z, N, shape.d, shape.k);
        const int64_t moments_each = oplora_lean_moments(shape.H, shape.Z, N, shape.d, shape.k);
        const size_t n = static_cast<size_t>(shape.layers);
        numbers.resize(n * static_cast<size_t>(numbers_each));
        moments.resize(n * static_cast<size_t>(moments_each));
        scalars.resize(n * OPLORA_LEAN_SCALARS);
        report.resize(n * OPLORA_LEAN_REPORT, -1);
        dh.resize(n * static_cast<size_t>(shape.H), -1);
        add_factors(shape, 0, 1e-3);
        for (size_t i = 0; i < factors.size(); i++) factors[i].random = shape.factors[i % shape.factors.size()].random;
        for (size_t i = 0; i < n; i++)
            layers.push_back({shape.H, shape.Z, N, shape.d, shape.k, 0x123456789abcdefu, static_cast<uint32_t>(i + 3),
                              shape.start, numbers.data() + i * static_cast<size_t>(numbers_each),
                              moments.data() + i * static_cast<size_t>(moments_each),
                              scalars.data() + i * OPLORA_LEAN_SCALARS, factors.data() + i * shape.factors.size(),
                              static_cast<int64_t>(shape.factors.size()), adamw[i],
                              report.data() + i * OPLORA_LEAN_REPORT, dh.data() + i * static_cast<size_t>(shape.H)});
    }
};

bool same_sides(const Side &core, const Side &device, std::string *where) {
    if (!same(core.report, device.report, "report", where) || !same(core.scalars, device.scalars, "scalars", where) ||
        !same(core.numbers, device.numbers, "numbers", where) ||
        !same(core.moments, device.moments, "moments", where) || !same(core.dh, device.dh, "dh", where))
        return false;
    return same_factors_and_steps(core, device, where);
}

// Both sides through the same calls.
struct Pair : CommonPair<Shape, Side> {
    explicit Pair(const Shape &s) : CommonPair(s) {
        const int64_t n = layers();
        take(oplora_lean_workspace_bytes_f32(core.layers.data(), n),
             oplora_cuda_lean_workspace_bytes(device.layers.data(), n),
             oplora_cuda_lean_table_bytes(device.layers.data(), n));
        check(oplora_cuda_lean_plan_layers(device.layers.data(), n, adamw.data(), rates.data(), halves.halves.data(),
                                           &verdict, workspace.begin, table.begin, &plan) == OPLORA_OK,
              shape.name + ": plan");
    }

    void begin() {
        for (auto &layer : core.layers) oplora_lean_start_f32(&layer, 0.01, nullptr);
        check(oplora_cuda_lean_start(&plan, table.begin, 0.01, nullptr) == cudaSuccess, shape.name + ": start runs");
        compare("start");
    }

    void measure() {
        const oplora_status status = oplora_lean_measure_f32(core.layers.data(), plan.n_layers, scratch.begin, nullptr);
        check(oplora_cuda_lean_measure(&plan, table.begin, nullptr) == cudaSuccess, shape.name + ": measure runs");
        check(status == OPLORA_OK || status == OPLORA_ENONFINITE, shape.name + ": measure");
        compare("measure");
    }

    int launch_step(int measured, const int *veto) {
        return oplora_cuda_lean_step(&plan, table.begin, measured, veto, nullptr);
    }

    void step(int measured = 0) {
        set_numbers();
        const oplora_status status =
            oplora_lean_step_f32(core.layers.data(), plan.n_layers, measured, scratch.begin, nullptr);
        for (auto &a : core.adamw) a.step += status == OPLORA_OK;
        check(launch_step(measured, nullptr) == cudaSuccess, shape.name + ": step runs");
        compare(measured ? "measured step" : "step");
    }
};

void steps(const Shape &shape, int count) {
    Pair pair(shape);
    pair.begin();
    for (int i = 0; i < count; i++) {
        pair.gradients(i == 0 ? 0.f : i % 2 ? 1e-2f : 1.f); // the first gradient of lora_A is zero: B is
        pair.step();
    }
    pair.each_adamw([](oplora_adamw &a) { a.hidden_lr = 0, a.weight_decay = 0; });
    pair.each_rates([](size_t, double &lr, double &decay) { lr = 3e-2, decay = 0; });
    pair.gradients(1e-3f);
    pair.measure();
    for (auto *side : {&pair.core, &pair.device}) { // as clipping does
        for (size_t i = 0; i < side->layers.size(); i++) side->report[i * OPLORA_LEAN_REPORT] *= 0.25;
        for (auto &d : side->dh) d *= 0.5;
        for (auto &gradient : side->gradients)
            for (auto &g : gradient) g *= 0.5f;
    }
    pair.halves.round(pair.core.gradients);
    pair.step(1);
}

void nothing_moves_at_rate_zero(const Shape &shape) {
    Pair pair(shape);
    pair.begin();
    pair.gradients(1.f);
    pair.each_adamw([](oplora_adamw &a) { a.hidden_lr = 0; });
    pair.each_rates([](size_t, double &lr, double &) { lr = 0; });
    const auto before = pair.device.out;
    pair.step();
    check(before == pair.device.out, shape.name + ": at rate 0 no factor moves");
}

// A rate and a decay to each factor, which change between steps of one plan, also to 0; what starts at random decays alike.
void rates_differ(const Shape &shape) {
    Pair pair(shape);
    pair.begin();
    for (int i = 0; i < 4; i++) {
        pair.each_rates([&](size_t f, double &lr, double &decay) {
            lr = std::ldexp(1e-3, 2 * static_cast<int>(f));
            decay = shape.factors[f].random ? std::ldexp(0.5 * i, -2 * static_cast<int>(f)) : 0.05;
            if (!shape.factors[f].random && i == 2) lr = 0;
            if (i == 3) lr = 0, decay = 0;
        });
        pair.gradients(1.f);
        if (i == 1) pair.measure();
        pair.step(i == 1);
    }
    pair.each_rates([](size_t f, double &lr, double &decay) { lr = f ? 1e-2 : 0, decay = 0; });
    pair.gradients(1e-2f);
    pair.step();
}

// Somebody writes into the model's own tensor: where its bits are not those of the value before rounding, it is what counts.
void rounded_edits_count(const Shape &shape) {
    Pair pair(shape);
    pair.begin();
    pair.gradients(1.f);
    pair.step();
    for (size_t f = 0; f < pair.core.out.size(); f++)
        for (size_t i = f; i < pair.core.out[f].size(); i += 3) {
            const uint16_t written = to_half(0.37f * static_cast<float>(i % 5) - 1, shape.dtype);
            pair.halves.out[f][i] = written;
            pair.core.out[f][i] = from_half(written, shape.dtype);
        }
    pair.gradients(1.f);
    pair.step();
}

void units_die_and_return(const Shape &shape) {
    Pair pair(shape);
    pair.begin();
    pair.gradients(1.f);
    pair.step();
    for (const float to : {-1.f, 1.f}) { // W1 z + c1 lies behind U and U1
        for (auto *side : {&pair.core, &pair.device})
            for (auto &l : side->layers)
                for (int64_t j = 0; j < shape.H; j += 2) l.numbers[l.weight_rank * (l.N + l.H) + j] = to;
        pair.gradients(1.f);
        pair.step();
        pair.step();
    }
    for (auto *side : {&pair.core, &pair.device})
        for (auto &l : side->layers)
            for (int64_t j = 0; j < shape.H; j++) l.numbers[l.weight_rank * (l.N + l.H) + j] = -2.f;
    pair.step(); // all are off
}

void refuses(const char *what, oplora_status expected, const std::vector<oplora_lean_f32> &layers) {
    oplora_cuda_plan plan;
    std::vector<char> memory(1 << 16);
    oplora_adamw numbers = {}, *adamw = &numbers;
    const double factors[4] = {}, *rates = factors;
    oplora_cuda_verdict verdict = {};
    check(oplora_cuda_lean_plan_layers(layers.data(), static_cast<int64_t>(layers.size()), &adamw, &rates, nullptr,
                                       &verdict, memory.data(), memory.data(), &plan) == expected,
          what);
}

void run(bool slow) {
    const auto U = OPLORA_UNIFORM, S = OPLORA_SIGN;
    using F = std::vector<FactorShape>;
    const std::vector<Shape> shapes = {
        {"one row", 1, 1, 2, 1, S, F{{1, true, false}}},
        {"odd, uniform", 4, 7, 2, 1, U, F{{31, true, false}, {33, false, false}}},
        {"odd, sign", 30, 128, 2, 1, S, F{{127, true, false}, {129, false, true}}},
        {"blocks end inside", 32, 130, 2, 1, U, F{{513, true, true}, {641, false, false}}},
        {"two random factors", 33, 128, 2, 1, S, F{{300, true, false}, {70, false, false}, {515, true, false}}},
        {"two random factors, uniform", 33, 128, 2, 1, U, F{{300, true, false}, {515, true, false}}},
        {"ranks 1 and 1", 8, 9, 1, 1, S, F{{100, true, false}, {60, false, false}}},
        {"ranks 4 and 2", 30, 20, 4, 2, U, F{{190, true, false}, {60, false, true}}},
        {"ranks 8 and 8", 12, 17, 8, 8, S, F{{90, true, false}, {33, false, false}}},
        {"bfloat16", 30, 128, 2, 1, S, F{{127, true, false}, {129, false, true}}, 1, OPLORA_BF16},
        {"float16, other ranks", 30, 20, 4, 2, U, F{{190, true, false}, {60, false, true}}, 1, OPLORA_F16},
        {"wide", 768, 5, 2, 1, S, F{{40, true, false}, {25, false, false}}},
        {"many layers", 4, 5, 2, 1, S, F{{9, true, false}, {6, false, false}}, slow ? 40 : 300},
    };
    for (const auto &shape : shapes) steps(shape, slow ? 2 : 4);
    for (const size_t i : {1, 2, 3, 4, 7, 8, 9, 12}) rates_differ(shapes[i]);
    rounded_edits_count(shapes[9]);
    rounded_edits_count(shapes[10]);
    if (!slow) {
        steps({"many parts", 5, 6, 2, 1, S, F{{300001, true, false}, {31, false, false}}}, 2);
        steps({"parts of several chunks", 1000, 2, 2, 1, S, F{{300001, false, false}, {31, true, false}}}, 1);
        steps({"31 rows", 4, 3, 2, 1, U, F{{31, true, false}}}, 2);
        steps({"33 rows", 32, 3, 2, 1, S, F{{33, true, false}}}, 2);
        steps({"a million rows", 1, 1, 2, 1, S, F{{1000001, true, false}}}, 1);
        steps({"parts, uniform", 3, 6, 2, 1, U, F{{9000, true, false}, {4097, false, false}}}, 2);
        steps({"wide hidden map", 4100, 3, 2, 1, S, F{{20, true, false}, {5, false, false}}}, 2);
        steps({"wide hidden map, other ranks", 600, 3, 3, 1, U, F{{20, true, false}, {5, false, false}}}, 2);
    }
    nothing_moves_at_rate_zero(shapes[3]);
    nothing_moves_at_rate_zero(shapes[7]);
    units_die_and_return(shapes[2]);
    units_die_and_return(shapes[1]);
    units_die_and_return(shapes[7]);
    for (const size_t i : {1, 2, 3, 4, 7, 8, 9}) large_gradients<Pair>(shapes[i]);
    nonfinite_changes_nothing<Pair>(shapes[2]);
    nonfinite_changes_nothing<Pair>(shapes[8]); // float16
    nonfinite_changes_nothing<Pair>(shapes.back());
}

} // namespace

int main(int argc, char **argv) {
    return in_every_order(argc, argv, "lean kernels", run, [] {
        Side side({"bad", 4, 5, 2, 1, OPLORA_SIGN, {{9, true, false}}});
        auto layers = side.layers;
        layers[0].numbers = nullptr;
        refuses("a missing pointer is refused", OPLORA_ENULL, layers);
        layers = side.layers;
        layers[0].N = 10;
        refuses("rows that do not add up are refused", OPLORA_ESIZE, layers);
        layers = side.layers;
        layers[0].moment_rank = 9;
        refuses("a rank above 8 is refused", OPLORA_ESIZE, layers);
        layers = side.layers;
        side.factors[0].rows = layers[0].N = int64_t{1} << 44;
        refuses("more chunks than a grid has blocks are refused", OPLORA_EOVERFLOW, layers);
        side.factors[0].rows = layers[0].N = int64_t{1} << 60;
        refuses("numbers beyond 2^63 bytes are refused", OPLORA_ESIZE, layers);
        layers[0].N = 9;
        layers[0].H = int64_t{1} << 60;
        refuses("units beyond 2^63 bytes are refused", OPLORA_ESIZE, layers);
    });
}
