// Marks a build of the kernels that executes them on the CPU: what may then call them with the CPU's own memory.
extern "C" {
extern const int oplora_cuda_on_cpu;
const int oplora_cuda_on_cpu = 1;
}
