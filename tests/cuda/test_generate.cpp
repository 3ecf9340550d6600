// generate's kernels and its backward's against the C core: bit for bit, but for the sum over a row-major W2 of the backward.
#include "generate.h"
#include "kernel_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>

namespace {

template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T> bool close(const std::vector<T> &a, const std::vector<T> &b) {
    double largest = 0, off = 0;
    for (size_t i = 0; i < a.size(); i++) {
        largest = std::max(largest, std::fabs(static_cast<double>(a[i])));
        off = std::max(off, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    }
    // sums in double: for float rounded once, for double in another order of a thousand terms
    return off <= (sizeof(T) == sizeof(float) ? 2 : 256) * std::numeric_limits<T>::epsilon() * largest;
}

template <class T> void compare(int64_t H, int64_t Z, int64_t N, oplora_layout layout, int64_t offset) {
    constexpr bool single = std::is_same<T, float>::value;
    const std::string name = std::string(single ? "float" : "double") + " H " + std::to_string(H) + " Z " +
                             std::to_string(Z) + " N " + std::to_string(N) +
                             (layout == OPLORA_ROWS ? " rows" : " columns") + " offset " + std::to_string(offset);
    std::mt19937 random(5);
    std::normal_distribution<T> normal;
    const auto numbers = [&](int64_t count) {
        std::vector<T> v(static_cast<size_t>(count));
        for (auto &x : v) x = normal(random);
        return v;
    };
    const auto z = numbers(Z), W1 = numbers(H * Z), c1 = numbers(H), c2 = numbers(N), g = numbers(N);
    const auto W2_memory = numbers(H * N + offset);
    const T *const W2 = W2_memory.data() + offset;
    struct Out {
        std::vector<T> h, v, dz, dW1, dc1, h_again;
        Out(int64_t H, int64_t Z, int64_t N)
            : h(static_cast<size_t>(H)), v(static_cast<size_t>(N)), dz(static_cast<size_t>(Z)),
              dW1(static_cast<size_t>(H * Z)), dc1(h), h_again(h) {}
    } core(H, Z, N), device(H, Z, N);
    const auto bytes = std::max(oplora_generate_backward_workspace_bytes(H, Z, N),
                                oplora_cuda_generate_backward_workspace_bytes(layout, H, Z, N));
    std::vector<double> workspace(static_cast<size_t>(bytes) / sizeof(double) + 1);

    const auto generate = [&](auto core_call, auto device_call) {
        core_call(z.data(), W1.data(), c1.data(), W2, c2.data(), layout, H, Z, N, core.h.data(), core.v.data(),
                  nullptr);
        check(device_call(z.data(), W1.data(), c1.data(), W2, c2.data(), layout, H, Z, N, device.h.data(),
                          device.v.data(), nullptr) == cudaSuccess,
              name + ": generate runs");
    };
    const auto backward = [&](auto core_call, auto device_call) {
        core_call(g.data(), z.data(), W1.data(), c1.data(), W2, layout, H, Z, N, core.dz.data(), core.dW1.data(),
                  core.dc1.data(), core.h_again.data(), workspace.data(), nullptr);
        std::fill(workspace.begin(), workspace.end(), std::nan(""));
        check(device_call(g.data(), z.data(), W1.data(), c1.data(), W2, layout, H, Z, N, device.dz.data(),
                          device.dW1.data(), device.dc1.data(), device.h_again.data(), workspace.data(),
                          nullptr) == cudaSuccess,
              name + ": backward runs");
    };
    if constexpr (single) {
        generate(oplora_generate_f32, oplora_cuda_generate_f32);
        backward(oplora_generate_backward_f32, oplora_cuda_generate_backward_f32);
    } else {
        generate(oplora_generate_f64, oplora_cuda_generate_f64);
        backward(oplora_generate_backward_f64, oplora_cuda_generate_backward_f64);
    }
    check(same(core.h, device.h) && same(core.h, device.h_again), name + ": h");
    check(same(core.v, device.v), name + ": v");
    const bool exactly = layout == OPLORA_COLUMNS;
    const auto agree = [&](const auto &a, const auto &b) { return exactly ? same(a, b) : close(a, b); };
    check(agree(core.dc1, device.dc1), name + ": dc1");
    check(agree(core.dW1, device.dW1), name + ": dW1");
    check(exactly ? same(core.dz, device.dz) : close(core.dz, device.dz), name + ": dz");
}

void hands_nan_on(oplora_layout layout) {
    const std::vector<float> z = {1, std::nanf("")}, W(12, 1.f), c1(3, 1.f), c2(4, 1.f);
    std::vector<float> h(3), v(4);
    check(oplora_cuda_generate_f32(z.data(), W.data(), c1.data(), W.data(), c2.data(), layout, 3, 2, 4, h.data(),
                                   v.data(), nullptr) == cudaSuccess &&
              std::all_of(v.begin(), v.end(), [](float x) { return std::isnan(x); }),
          "NaN in z is NaN in every entry");
}

void run(bool slow) {
    for (const auto layout : {OPLORA_COLUMNS, OPLORA_ROWS}) {
        hands_nan_on(layout);
        compare<float>(1, 1, 1, layout, 0);
        compare<float>(4, 7, 31, layout, 0);
        compare<float>(30, 128, 33, layout, 0);
        compare<float>(33, 129, 2052, layout, 0);
        compare<float>(33, 129, 2052, layout, 1); // no 16-byte loads
        compare<float>(768, 3, 40, layout, 0);
        compare<double>(5, 6, 1025, layout, 0);
        compare<double>(17, 9, 2050, layout, 1);
        if (slow) continue;
        compare<float>(3, 2, 40000, layout, 0);
        compare<double>(3, 2, 20001, layout, 0);
    }
    if (!slow && cuda_on_cpu::options.order == cuda_on_cpu::Order::random)
        compare<float>(2, 1, 1000001, OPLORA_COLUMNS, 0);
}

} // namespace

int main(int argc, char **argv) {
    return in_every_order(argc, argv, "generate's kernels", run, [] {
        check(oplora_cuda_generate_backward_workspace_bytes(OPLORA_COLUMNS, 0, 1, 1) == -1, "a size of 0 is refused");
        check(oplora_cuda_generate_backward_workspace_bytes(OPLORA_COLUMNS, INT64_MAX / 2, 4, 4) == -1,
              "overflow is refused");
    });
}
