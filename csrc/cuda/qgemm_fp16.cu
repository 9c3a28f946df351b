#include "launch.cuh"

template void lowbit::gpu::launch_gemm<lowbit::gpu::Fp16>(const Linear&, Queue);
