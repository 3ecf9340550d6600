/* What of the library's interface is no kernel. */
#include "plan.h"

#include "device.h"

const char *oplora_cuda_interface(void) { return OPLORA_CUDA_HASH; }

int oplora_cuda_ready(int *driver, int *runtime) {
    int devices;
    *driver = *runtime = 0;
    cudaDriverGetVersion(driver); /* these two answer without a driver, or beside one that is too old */
    cudaRuntimeGetVersion(runtime);
    return cudaGetDeviceCount(&devices);
}

const char *oplora_cuda_strerror(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
