#include "mixer_kernel.cuh"

template spin::hopper::Kernel spin::hopper::kernel_of<spin::hopper::BFloat16>(int64_t, int);
