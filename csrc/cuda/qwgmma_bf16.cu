#include "launch.cuh"

template void lowbit::gpu::launch_wgmma<lowbit::gpu::Bf16>(const Linear&, Queue);
