#include "mhc/launch_seam.cuh"

extern "C" size_t dsv4_hyper_connection_workspace_size(int64_t tokens, int64_t hidden) {
  if (tokens <= 0 || hidden <= 0 || tokens > INT32_MAX || hidden > dsv4::kMaxHidden) return 0;
  return static_cast<size_t>(dsv4::seam_workspace_bytes(tokens, hidden));
}

extern "C" dsv4_status dsv4_hyper_connection_pre(const dsv4_hyper_connection_pre_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_pre");
  const dsv4_hyper_connection_pre_args args = check.read(given);
  const int64_t tokens = extent(args.streams, 0), hidden = extent(args.streams, 2);
  check_streams(check, "streams", args.streams, kAny, kAny);
  check.range("streams rows (tokens)", tokens, 0, INT32_MAX);
  check_projection(check, args.fn, args.base, args.scale, kRowsOf<Form::kPre>, 3, hidden, args.epsilon,
                   args.hc_epsilon);
  check_pre_in(check, args.pre_in, tokens);
  check_norm(check, args.norm_weight, args.norm_unrounded, hidden);
  check_layer_input(check, "out_layer_input", args.out_layer_input, tokens, hidden);
  check_coefficients(check, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations,
                     tokens);
  check_workspace(check, args.workspace, tokens, hidden);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Seam seam = {};
  set_streams(seam, args.streams);
  set_projection(seam, args.fn, args.base, args.scale, args.epsilon, args.hc_epsilon);
  seam.pre_in = static_cast<const float4*>(args.pre_in.data);
  set_layer_input(seam, args.norm_weight, args.out_layer_input, args.norm_unrounded);
  set_coefficients(seam, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations);
  return launch_seam<Form::kPre>(target, seam, args.workspace);
}
