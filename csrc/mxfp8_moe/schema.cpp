#include "common/schemas.h"

ABIDING_SCHEMAS(abiding, mxfp8_moe, m) {
  m.def(
      "mxfp8_experts_quant(Tensor input, Tensor problem_sizes, Tensor expert_offsets, Tensor blockscale_offsets, "
      "Tensor! quant_output, Tensor! scale_factor) -> ()");
  m.def(
      "cutlass_mxfp8_grouped_mm(Tensor a, Tensor b, Tensor sfa, Tensor sfb, Tensor! out, Tensor problem_sizes, "
      "Tensor expert_offsets, Tensor blockscale_offsets) -> ()");
  m.def(
      "mxfp8_quantize(Tensor input, Tensor? offsets, bool ends, *, bool rowwise=False, Tensor! data, Tensor! scales) "
      "-> ()");
  m.def(
      "mxfp8_rebase(Tensor weight, Tensor weight_scales, *, Tensor! out, Tensor! out_scales, "
      "Tensor! counts, Tensor! errors) -> ()");
  m.def("mxfp8_round(Tensor input, *, Tensor! out) -> ()");
  m.def(
      "mxfp8_grouped_mm(Tensor a, Tensor? a_scales, Tensor weight, Tensor weight_scales, Tensor? offsets, bool ends, "
      "*, int compute=0, Tensor! out) -> ()");
  m.def("mxfp8_implementation(Tensor like, int rows, int experts, int[] n, int[] k, int compute) -> str");
  m.def(
      "mxfp8_moe(Tensor x, Tensor w13, Tensor s13, Tensor w2, Tensor s2, Tensor topk_ids, Tensor topk_weights, "
      "int activation, bool w8a8, Tensor(a!)? workspace, *, Tensor? expert_map=None, int? global_experts=None, "
      "float swiglu_alpha=1.702, float swiglu_beta=1., float? swiglu_limit=None, int compute=0, Tensor(b!) out) -> ()");
  m.def("mxfp8_moe_workspace_bytes(int tokens, int top_k, int experts, int hidden, int intermediate) -> int");
}
