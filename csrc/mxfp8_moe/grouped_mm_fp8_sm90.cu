// The sm_90 grouped GEMM of e4m3 rows, on the FP8 tensor cores.
#include "mxfp8_moe/grouped_mm_sm90/launch.cuh"

namespace abiding::mxfp8_moe {
namespace sm90_mm {
namespace {

// consumer warpgroups, kBlockK, stages, cluster mode, CTAs per SM, row blocks and token blocks per warpgroup
using StreamK_N16 = Config<RowFormat::kE4m3, TileShape::kStreamK_N16, 2, 128, 9, ClusterMode::kStreamK>;
using N64 = Config<RowFormat::kE4m3, TileShape::kN64, 2, 128, 3, ClusterMode::kNone, 2>;
using M256_N128 = Config<RowFormat::kE4m3, TileShape::kM256_N128, 2, 128, 3, ClusterMode::kNone, 1, 2>;
using N192_Cluster2 = Config<RowFormat::kE4m3, TileShape::kN192_Cluster2, 2, 128, 4, ClusterMode::kMulticast, 1, 1, 2>;

bool supports_fp8(const GroupedMmParams& p) {
  const bool out_fits = p.out_dtype == DType::kFloat32 || fits_tma(2 * p.out_stride);  // TMA stores no fp32
  return p.a_scales && weights_fit_tma(p) && fits_tma(p.a_stride) && out_fits;
}

cudaError_t run_fp8(const GroupedMmParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  const Plan plan =
      choose_plan(RowFormat::kE4m3, p.expected_rows, p.groups.count, p.n, p.k, sms * StreamK_N16::kCtasPerSm);
  switch (plan.shape) {
    case TileShape::kStreamK_N16: return launch_config<StreamK_N16>(p, plan.cluster, sms, stream);
    case TileShape::kN64: return launch_config<N64>(p, 1, sms, stream);
    case TileShape::kM256_N128: return launch_config<M256_N128>(p, 1, sms, stream);
    default: return launch_config<N192_Cluster2>(p, 2, sms, stream);
  }
}

}  // namespace
}  // namespace sm90_mm

const GroupedMmImpl kGroupedMmSm90Fp8 =
    sm90_mm::make_impl("sm90_fp8", RowFormat::kE4m3, sm90_mm::supports_fp8, sm90_mm::run_fp8);

}  // namespace abiding::mxfp8_moe
