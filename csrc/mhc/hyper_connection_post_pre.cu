#include "mhc/launch_seam.cuh"

extern "C" dsv4_status dsv4_hyper_connection_post_pre(const dsv4_hyper_connection_post_pre_args* given,
                                                      dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_post_pre");
  const dsv4_hyper_connection_post_pre_args args = check.read(given);
  const int64_t tokens = extent(args.x, 0), hidden = extent(args.x, 1);
  check_update(check, args.x, args.post, args.comb, tokens, hidden);
  check.range("x rows (tokens)", tokens, 0, INT32_MAX);
  check_streams(check, "streams", args.streams, tokens, hidden);
  check_projection(check, args.fn, args.base, args.scale, kRowsOf<Form::kPostPre>, 3, hidden, args.epsilon,
                   args.hc_epsilon);
  check_pre_in(check, args.pre_in, tokens);
  check_norm(check, args.norm_weight, args.norm_unrounded, hidden);
  check_streams(check, "out_streams", args.out_streams, tokens, hidden);
  check_layer_input(check, "out_layer_input", args.out_layer_input, tokens, hidden);
  check_coefficients(check, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations,
                     tokens);
  check.in_place(args.out_streams, args.streams);
  check_workspace(check, args.workspace, tokens, hidden);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Seam seam = {};
  set_streams(seam, args.streams);
  seam.update = update_inputs_of(args.x, args.post, args.comb);
  seam.out_streams = streams_of(args.out_streams);
  set_projection(seam, args.fn, args.base, args.scale, args.epsilon, args.hc_epsilon);
  seam.pre_in = static_cast<const float4*>(args.pre_in.data);
  set_layer_input(seam, args.norm_weight, args.out_layer_input, args.norm_unrounded);
  set_coefficients(seam, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations);
  return launch_seam<Form::kPostPre>(target, seam, args.workspace);
}
