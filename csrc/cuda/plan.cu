/* What of the library's interface is no kernel. */
#include "plan.h"

#include "device.h"

int oplora_cuda_version(void) { return OPLORA_CUDA_VERSION; }

const char *oplora_cuda_strerror(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
