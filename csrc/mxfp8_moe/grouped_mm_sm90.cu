// The sm_90 grouped GEMM of bf16 rows: its configurations, and which of them a plan names.
#include "mxfp8_moe/grouped_mm_sm90/launch.cuh"

namespace abiding::mxfp8_moe {
namespace sm90_mm {
namespace {

// consumer warpgroups, kBlockK, stages, cluster mode, CTAs per SM
template <RowFormat kRows>
using StreamK_N16 = Config<kRows, TileShape::kStreamK_N16, 2, 128, 4, ClusterMode::kStreamK, 2>;
template <RowFormat kRows>
using N32 = Config<kRows, TileShape::kN32, 2, 128, 4, ClusterMode::kNone, 2>;
template <RowFormat kRows>
using N64 = Config<kRows, TileShape::kN64, 2, 128, 3, ClusterMode::kNone, 2>;
template <RowFormat kRows>
using M256_N128 = Config<kRows, TileShape::kM256_N128, 4, 64, 6, ClusterMode::kNone>;
template <RowFormat kRows>
using N160_Cluster2 = Config<kRows, TileShape::kN160_Cluster2, 2, 64, 7, ClusterMode::kMulticast>;
template <RowFormat kRows>
using N256_Cluster2 = Config<kRows, TileShape::kN256_Cluster2, 2, 64, 5, ClusterMode::kMulticast>;

template <RowFormat kRows>
cudaError_t launch_plan(const GroupedMmParams& p, const Plan& plan, int sms, cudaStream_t stream) {
  switch (plan.shape) {
    case TileShape::kStreamK_N16: return launch_config<StreamK_N16<kRows>>(p, plan.cluster, sms, stream);
    case TileShape::kN32: return launch_config<N32<kRows>>(p, 1, sms, stream);
    case TileShape::kN64: return launch_config<N64<kRows>>(p, 1, sms, stream);
    case TileShape::kM256_N128: return launch_config<M256_N128<kRows>>(p, 1, sms, stream);
    case TileShape::kN160_Cluster2: return launch_config<N160_Cluster2<kRows>>(p, 2, sms, stream);
    default: break;
  }
  return launch_config<N256_Cluster2<kRows>>(p, 2, sms, stream);
}

bool supports(const GroupedMmParams& p) { return weights_fit_tma(p) && fits_tma(2 * p.a_stride); }

cudaError_t run(const GroupedMmParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  const Plan plan = choose_plan(RowFormat::kBf16, p.expected_rows, p.groups.count, p.n, p.k,
                                sms * StreamK_N16<RowFormat::kBf16>::kCtasPerSm);
  return p.interleaved ? launch_plan<RowFormat::kBf16Interleaved>(p, plan, sms, stream)
                       : launch_plan<RowFormat::kBf16>(p, plan, sms, stream);
}

}  // namespace
}  // namespace sm90_mm

const GroupedMmImpl kGroupedMmSm90 =
    sm90_mm::make_impl("sm90", RowFormat::kBf16Interleaved, sm90_mm::supports, sm90_mm::run);

}  // namespace abiding::mxfp8_moe
