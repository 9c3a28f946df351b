#include "launch.cuh"

template void lowbit::gpu::launch_gemm<lowbit::gpu::Bf16>(const Linear&, Queue);
