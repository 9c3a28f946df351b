#include "launch.cuh"

template void lowbit::gpu::launch_wgmma<lowbit::gpu::Fp16>(const Linear&, Queue);
