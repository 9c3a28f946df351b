#include "launch.cuh"

template void lowbit::gpu::launch_gemv<lowbit::gpu::Bf16>(const Linear&, Queue);
