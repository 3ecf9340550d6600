// liboplora_cuda.so, and torch's device and stream for a call of it.
//
// It is a plain C library beside this one, which is loaded when the first CUDA tensor arrives: so nothing here needs CUDA
// to be built, or to be there.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>

#include <string>

#include "../cuda/plan.h"
#include "tensors.h"

namespace {

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
        "OPLORA_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir --no-binary=oplora oplora, or "
        "`pip install .` in its sources.";
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
enum { INSUFFICIENT_DRIVER = 35, INVALID_DEVICE_FUNCTION = 98, NO_KERNEL_IMAGE = 209, UNSUPPORTED_PTX = 222 };

std::string advice(const CudaLibrary &library, int error) {
    if (error == NO_KERNEL_IMAGE || error == INVALID_DEVICE_FUNCTION)
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

} // namespace
