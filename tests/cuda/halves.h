// A model's factors of 16 bits, for the tests: gradients in, values out.
#pragma once

#include "cuda_on_cpu.h"
#include "plan.h"

#include <vector>

inline uint16_t to_half(float x, oplora_dtype dtype) {
    return dtype == OPLORA_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}
inline float from_half(uint16_t x, oplora_dtype dtype) {
    return dtype == OPLORA_BF16 ? __bfloat162float(__ushort_as_bfloat16(x)) : __half2float(__ushort_as_half(x));
}

struct Halves {
    oplora_dtype dtype;
    std::vector<std::vector<uint16_t>> gradients, out;
    std::vector<oplora_cuda_half> halves;

    Halves(const std::vector<oplora_factor_f32> &factors, oplora_dtype dtype_) : dtype(dtype_) {
        for (const auto &f : factors) {
            gradients.emplace_back(static_cast<size_t>(f.rows));
            out.emplace_back(static_cast<size_t>(f.rows));
        }
        for (size_t i = 0; i < factors.size(); i++) halves.push_back({gradients[i].data(), out[i].data(), dtype});
    }

    bool used() const { return dtype != OPLORA_F32; }

    // Rounds the gradients, here and in what the core sees.
    void round(std::vector<std::vector<float>> &core) {
        for (size_t f = 0; used() && f < core.size(); f++)
            for (size_t i = 0; i < core[f].size(); i++) {
                gradients[f][i] = to_half(core[f][i], dtype);
                core[f][i] = from_half(gradients[f][i], dtype);
            }
    }

    bool holds(const std::vector<std::vector<float>> &core) const {
        for (size_t f = 0; used() && f < core.size(); f++)
            for (size_t i = 0; i < core[f].size(); i++)
                if (out[f][i] != to_half(core[f][i], dtype)) return false;
        return true;
    }
};
