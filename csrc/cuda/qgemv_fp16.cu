#include "launch.cuh"

template void lowbit::gpu::launch_gemv<lowbit::gpu::Fp16>(const Linear&, Queue);
