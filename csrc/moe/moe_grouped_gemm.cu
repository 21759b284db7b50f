#include "moe/few_tiles.cuh"
#include "moe/moe_grouped_gemm_policy.h"

namespace dsv4 {

// Warps of a block. NVFP4 has twice the factors in flight: 6 warps have registers enough for them.
template <int Factors>
constexpr int kFewTilesWarps = Factors == 4 ? 6 : 8;

template <int Factors, bool SwiGlu>
static dsv4_status launch_as(const LaunchTarget& target, const FewTiles& product) {
  const int64_t groups = int64_t{product.tiles} * product.weight_rows / kGroupRows;
  const uint32_t blocks = few_tiles_blocks(*target.device, groups, kFewTilesShared);
  const Geometry geometry = {blocks, kFewTilesWarps<Factors> * kWarpLanes, kFewTilesShared};
  return launch<moe_few_tiles_kernel<Factors, SwiGlu, kFewTilesWarps<Factors>, kFewTilesBlocks>>(target, geometry,
                                                                                                 product);
}

dsv4_status launch_few_tiles(const LaunchTarget& target, const FewTiles& product, bool nvfp4, bool swiglu) {
  if (nvfp4) return swiglu ? launch_as<4, true>(target, product) : launch_as<4, false>(target, product);
  return swiglu ? launch_as<2, true>(target, product) : launch_as<2, false>(target, product);
}

}  // namespace dsv4
